"""What the gradients of a Vision Transformer give away, and what stops that: attacks, audits, defences.

Two verbs and one noun: `attack(model, update)` returns what a server recovers from a client's `Update`, with a
certificate of how far to trust it; `audit(model, …)` says what updates of a model leak, by which theorem, and what
would stop it. A model of one's own is described by `register_view`.

Names and modules load when they are first used. `__init__.pyi` lists them.
"""
import lazy_loader

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
