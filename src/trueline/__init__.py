"""Trueline: align a language model by contrast, with no reward model and no preference data.

Names are loaded on first use, so `import trueline` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trueline.engine.decoding import Decoder, generate
    from trueline.engine.hook import guided
    from trueline.engine.protocol import Prompt, Step, Ticket
    from trueline.errors import ConfigError, DataError, ModelError, TruelineError
    from trueline.evals.judging import JudgeConfig
    from trueline.jobs.alignment import AlignResults, align
    from trueline.jobs.diagnosis import DiagnoseConfig, diagnose
    from trueline.jobs.distil_config import DistilConfig
    from trueline.jobs.distillation import DistilResults, distil
    from trueline.jobs.exporting import ExportConfig, export
    from trueline.jobs.judgements import (
        AgreementConfig,
        WinRateConfig,
        measure_agreement,
        measure_win_rate,
    )
    from trueline.jobs.measurement import MeasureConfig, measure
    from trueline.jobs.projects import AlignConfig, Principle, Safety, Thresholds
    from trueline.jobs.prompt_files import generate_file
    from trueline.jobs.readings import Diagnosis
    from trueline.jobs.reports import ReportConfig, report
    from trueline.jobs.row_plan import PromptFileConfig
    from trueline.jobs.sessions import MeasureResults
    from trueline.jobs.stacking import StackConfig, stack
    from trueline.jobs.sweeps import SweepConfig, sweep
    from trueline.methods import METHODS, make_method
    from trueline.methods.ada_cd import AdaCD
    from trueline.methods.blend import Blend
    from trueline.methods.contrast import Contrast
    from trueline.methods.linear_alignment import LinearAlignment
    from trueline.methods.plain import Plain
    from trueline.methods.self_cd import SAFETY_PROMPT, SelfCD
    from trueline.models.load import LanguageModel, load_model
    from trueline.models.source import ModelConfig
    from trueline.types import Completion, Message, Method, Request, SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "trueline.engine.decoding": ("Decoder", "generate"),
    "trueline.engine.protocol": ("Prompt", "Step", "Ticket"),
    "trueline.errors": ("ConfigError", "DataError", "ModelError", "TruelineError"),
    "trueline.engine.hook": ("guided",),
    "trueline.jobs.diagnosis": ("DiagnoseConfig", "diagnose"),
    "trueline.jobs.alignment": ("AlignResults", "align"),
    "trueline.jobs.projects": ("AlignConfig", "Principle", "Safety", "Thresholds"),
    "trueline.jobs.distil_config": ("DistilConfig",),
    "trueline.jobs.distillation": ("DistilResults", "distil"),
    "trueline.jobs.readings": ("Diagnosis",),
    "trueline.jobs.exporting": ("ExportConfig", "export"),
    "trueline.jobs.prompt_files": ("generate_file",),
    "trueline.jobs.row_plan": ("PromptFileConfig",),
    "trueline.jobs.stacking": ("StackConfig", "stack"),
    "trueline.evals.judging": ("JudgeConfig",),
    "trueline.jobs.judgements": (
        *("AgreementConfig", "WinRateConfig", "measure_agreement", "measure_win_rate"),
    ),
    "trueline.jobs.measurement": ("MeasureConfig", "measure"),
    "trueline.jobs.reports": ("ReportConfig", "report"),
    "trueline.jobs.sessions": ("MeasureResults",),
    "trueline.jobs.sweeps": ("SweepConfig", "sweep"),
    "trueline.models.source": ("ModelConfig",),
    "trueline.methods": ("METHODS", "make_method"),
    "trueline.methods.ada_cd": ("AdaCD",),
    "trueline.methods.blend": ("Blend",),
    "trueline.methods.contrast": ("Contrast",),
    "trueline.methods.linear_alignment": ("LinearAlignment",),
    "trueline.methods.plain": ("Plain",),
    "trueline.methods.self_cd": ("SAFETY_PROMPT", "SelfCD"),
    "trueline.models.load": ("LanguageModel", "load_model"),
    "trueline.types": ("Completion", "Message", "Method", "Request", "SamplingParams"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    """Import the module that defines a public name, on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'trueline' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return list(__all__)
