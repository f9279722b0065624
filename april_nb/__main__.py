"""`april` and `python -m april_nb`: the command line, which an interruption ends in one line from the start."""
import sys


def main() -> None:
    """Loads the command line and runs it."""
    try:
        from april_nb import cli
        cli.main()
    except KeyboardInterrupt:   # before `cli.main` could listen
        print("april: interrupted; nothing was begun", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__": main()
