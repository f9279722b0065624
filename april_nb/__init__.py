__version__ = "0.1.0"


def __getattr__(name):
    """`april_nb.audit(model, images, labels)` without an import of the module beforehand."""
    if name != "audit": raise AttributeError(f"module 'april_nb' has no attribute {name!r}")
    from importlib import import_module
    return import_module("april_nb.audit")


def start():
    """The `april` command: PyTorch takes seconds to load, in which an interruption is one line, too."""
    import sys
    try: from april_nb.cli import main
    except KeyboardInterrupt:
        print("april: interrupted before anything began", file=sys.stderr)
        raise SystemExit(130) from None
    main()
