"""A page in a real browser, for the tests of pages: what it draws, and whether it fetches anything."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

# Measures what was drawn: each figure's place, its visible shapes and its words; and what was fetched.
PROBE = """<script>
const figures = [...document.querySelectorAll('figure')].map(f => {
  const box = f.querySelector('svg').getBoundingClientRect();
  const seen = e => { const b = e.getBoundingClientRect(); return b.width * b.height > 0; };
  return {id: f.id, x: box.x, y: box.y + scrollY, width: box.width, height: box.height,
          shapes: [...f.querySelectorAll('path, use')].filter(seen).length,
          words: [...f.querySelectorAll('text')].filter(seen).map(t => t.textContent)};
});
document.body.dataset.found = JSON.stringify(
  {figures, fetched: performance.getEntriesByType('resource').map(r => r.name), height: document.body.scrollHeight});
</script></body>"""


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        assert not os.environ.get("CI"), "CI has to open the page in a browser: install chromium"
        pytest.skip("no Chromium on this machine; on Debian: apt install chromium")
    return found


def chromium(*arguments: str, folder: Path) -> str:
    """A headless run without network (no name resolves), in a profile of its own."""
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def drawn(page: Path) -> dict[str, Any]:
    """What PROBE finds in a page: its figures, what was fetched, its height."""
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    dom = chromium("--dump-dom", "--window-size=1100,900", f"file://{probed}", folder=page.parent)
    attribute = re.search(r'data-found="([^"]*)"', dom)
    assert attribute, "the page did not load"
    return json.loads(attribute[1].replace("&quot;", '"'))


def holds_everything_itself(page: Path) -> None:
    """No script, nothing that is fetched, and every id once."""
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "@import" not in text and "<link" not in text
    named = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]*)', text)
    assert named and all(place.startswith("#") for place in named)
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids)), "figures share a page, so their ids must differ"
