"""Text to token ids and back. The `tokenizers` library is imported when it is first needed."""

from dsv4.text.stream import StreamDecoder
from dsv4.text.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

__all__ = ["BPETokenizer", "ByteTokenizer", "StreamDecoder", "Tokenizer", "load_tokenizer", "train_bpe"]
