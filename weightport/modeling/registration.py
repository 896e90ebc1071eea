"""Makes transformers' Auto classes know our families as soon as transformers is imported, and not before.

`import weightport` stays free of torch and transformers: a finder on `sys.meta_path` watches their imports, and
registers with an Auto class once it exists. It waits for the end of the outermost import, because transformers'
modules import each other while they are executed, and ours need some of them whole.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


@dataclass(frozen=True)
class Registration:
    """One `register` call of an Auto class: what is registered for a configuration, by which argument.

    Classes are named `module:name`; ours are not imported before the module of the Auto class has been.
    """

    auto_class: str
    config: str
    implementation: str
    argument: str

    @property
    def auto_module(self) -> str:
        return self.auto_class.partition(":")[0]

    def apply(self) -> None:
        register = _resolve(self.auto_class).register
        config = _resolve(self.config)
        if self.argument == "config":
            register(config.model_type, config, exist_ok=True)
        else:
            register(config, **{self.argument: _resolve(self.implementation)}, exist_ok=True)


@dataclass(frozen=True)
class Completion:
    """A call of our function `implementation` once transformers' module `auto_module` exists."""

    auto_module: str
    implementation: str

    def apply(self) -> None:
        _resolve(self.implementation)()


def _resolve(reference: str):
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


_AUTO = "transformers.models.auto"
_OFA = "weightport.modeling.ofa"
_OFA_CONFIG = f"{_OFA}.configuration_ofa:OFAConfig"
_OFA_VISION_CONFIG = f"{_OFA}.configuration_ofa:OFAVisionConfig"
_OFA_VISION_MODEL = f"{_OFA}.vision_ofa:OFAVisionModel"
_OFA_MODEL = f"{_OFA}.modeling_ofa:OFAModel"
_OFA_GENERATION = f"{_OFA}.modeling_ofa:OFAForConditionalGeneration"
_OFA_IMAGES = f"{_OFA}.image_processing_ofa:OFAImageProcessor"
_OFA_PROCESSOR = f"{_OFA}.processing_ofa:OFAProcessor"

REGISTRATIONS = (
    Registration(f"{_AUTO}.configuration_auto:AutoConfig", _OFA_CONFIG, _OFA_CONFIG, "config"),
    Registration(f"{_AUTO}.configuration_auto:AutoConfig", _OFA_VISION_CONFIG, _OFA_VISION_CONFIG, "config"),
    Registration(f"{_AUTO}.modeling_auto:AutoModel", _OFA_CONFIG, _OFA_MODEL, "model_class"),
    Registration(f"{_AUTO}.modeling_auto:AutoModel", _OFA_VISION_CONFIG, _OFA_VISION_MODEL, "model_class"),
    Registration(f"{_AUTO}.modeling_auto:AutoModelForImageTextToText", _OFA_CONFIG, _OFA_GENERATION, "model_class"),
    Registration(f"{_AUTO}.modeling_auto:AutoModelForMultimodalLM", _OFA_CONFIG, _OFA_GENERATION, "model_class"),
    Registration(f"{_AUTO}.modeling_auto:AutoModelForSeq2SeqLM", _OFA_CONFIG, _OFA_GENERATION, "model_class"),
    Registration(
        f"{_AUTO}.image_processing_auto:AutoImageProcessor", _OFA_CONFIG, _OFA_IMAGES, "slow_image_processor_class"
    ),
    Registration(f"{_AUTO}.processing_auto:AutoProcessor", _OFA_CONFIG, _OFA_PROCESSOR, "processor_class"),
)


COMPLETIONS = (
    Completion(
        "transformers.models.florence2.processing_florence2",
        "weightport.modeling.florence2.chat_templates:accept_chat_templates",
    ),
)


class AutoRegistrar(MetaPathFinder):
    """Finds transformers' and our modules as the other finders do, and registers when such an import has ended."""

    watched = ("transformers.", "weightport.modeling.")

    def __init__(self, registrations: Sequence[Registration | Completion]):
        self.pending = list(registrations)
        self.executing: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not self.pending or not f"{fullname}.".startswith(self.watched):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _AnnouncingLoader(spec.loader, self)
                return spec
        return None

    def register(self) -> None:
        """Registers with every Auto class that exists, unless a watched module is being executed."""
        # Importing our modules ends in here again: one registration at a time.
        while not self.executing and (due := next((r for r in self.pending if r.auto_module in sys.modules), None)):
            self.pending.remove(due)
            try:
                due.apply()
            except Exception as error:
                # The import of transformers that led here is somebody else's, and must not fail for us.
                warnings.warn(f"weightport could not register {due.implementation}: {error!r}", stacklevel=2)


class _AnnouncingLoader(Loader):
    """Another finder's loader, which tells the registrar when its module is being executed and when it has been."""

    def __init__(self, loader: Loader, registrar: AutoRegistrar):
        self.loader = loader
        self.registrar = registrar

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its own loader: inspect and importlib.resources look at it.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.registrar.executing.add(module.__name__)
        try:
            self.loader.exec_module(module)
        finally:
            self.registrar.executing.discard(module.__name__)
        self.registrar.register()


def install() -> None:
    """Registers with the Auto classes that exist, and waits for the others. Calling it again does nothing."""
    if not any(isinstance(finder, AutoRegistrar) for finder in sys.meta_path):
        registrar = AutoRegistrar((*REGISTRATIONS, *COMPLETIONS))
        sys.meta_path.insert(0, registrar)
        registrar.register()


__all__ = ["COMPLETIONS", "REGISTRATIONS", "AutoRegistrar", "Completion", "Registration", "install"]
