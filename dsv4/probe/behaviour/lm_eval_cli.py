"""lm-eval's own command line, with `--model dsv4` known to it: `python -m dsv4.probe.behaviour.lm_eval_cli run ...`."""

from dsv4.errors import UserError


def main() -> None:
    """Register the model and hand over. UserError without lm-eval."""
    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("lm-eval is not installed: pip install 'dsv4[eval]'") from None
    from dsv4.probe.behaviour import harness

    assert harness.HarnessModel  # its registration is what was imported
    cli_evaluate()


if __name__ == "__main__":
    main()
