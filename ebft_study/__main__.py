"""The command `ebft-study`, also as `python -m ebft_study`; a signal ends it in order even while it is imported."""

import signal
import sys


def main() -> None:
    """Run the command line; SIGTERM is Ctrl-C from the first moment on."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from ebft_study import cli
    except KeyboardInterrupt:
        print("interrupted before it began; repeat the command", file=sys.stderr)
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
