"""Many processes that train one model under torchrun. Start with processes.py; the picture is in docs/scale.md."""
