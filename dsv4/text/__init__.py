"""Text to ids and back, messages to prompts and back. The `tokenizers` library is imported when it is first needed."""

from dsv4.text.chat import chat_template, render, write_chat_template
from dsv4.text.parse import ChatParser, Event, Reply, read_reply
from dsv4.text.prompt import Control, Prompt
from dsv4.text.stream import StreamDecoder
from dsv4.text.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "ChatParser",
    "Control",
    "Event",
    "Prompt",
    "Reply",
    "StreamDecoder",
    "Tokenizer",
    "chat_template",
    "load_tokenizer",
    "read_reply",
    "render",
    "train_bpe",
    "write_chat_template",
]
