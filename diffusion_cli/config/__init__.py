"""From the words of a command line to a checked configuration, without importing torch.

The YAML files under `conf` are the reference: one file a command, one folder a group, one file an option.
Each option names a class by `_target_` and gives every keyword argument of it.
"""

from diffusion_cli.config.catalogue import (
    CONF,
    GROUPS,
    HERE,
    brought_by,
    chosen,
    defaults,
    did_you_mean,
    documented,
    groups,
    options,
    summary,
)
from diffusion_cli.config.completion import COMPLETION_HELP, complete, completion_script
from diffusion_cli.config.compose import compose
from diffusion_cli.config.evaluation import (
    EXACT,
    CompareConfig,
    EvalConfig,
    HistoryComparison,
    Measuring,
    ModelEvaluation,
    ReconstructionEvaluation,
    SampleFilesEvaluation,
    SamplesEvaluation,
)
from diffusion_cli.config.grid import Value, Variant, load_grid
from diffusion_cli.config.help_pages import command_help, group_help, groups_asked, ignored_words, overview
from diffusion_cli.config.introspection import CFG, INFO, config_text, info_text
from diffusion_cli.config.launcher import (
    LAUNCHERS,
    launch,
    launchers,
    split_launcher,
    submission_problem,
)
from diffusion_cli.config.loading import load
from diffusion_cli.config.mapping_words import double_quoted
from diffusion_cli.config.objectives import has_best, higher_is_better, named_value, objectives
from diffusion_cli.config.plugins import allow, allowing_words, is_allowed, without_plugins
from diffusion_cli.config.runs import differing, fingerprint, flatten, identity
from diffusion_cli.config.sampling import SamplingSettings
from diffusion_cli.config.schema import (
    COMMANDS,
    FIRST_WORDS,
    GRIDS,
    UNSWEPT,
    Config,
    DataConfig,
    EditConfig,
    EMACommandConfig,
    EMAConfig,
    ExportConfig,
    ImportConfig,
    NewConfig,
    PlotConfig,
    PushConfig,
    ReportConfig,
    RunsConfig,
    SampleConfig,
    TrainConfig,
    seconds,
)
from diffusion_cli.config.seeds import shared_seeds
from diffusion_cli.config.signature import signature
from diffusion_cli.config.sweepers import SWEEPERS, SweepPlan, folder_of_sweep, plan_sweep
from diffusion_cli.config.sweeps import Sweep, expand, load_sweep
from diffusion_cli.config.system_errors import system_error
from diffusion_cli.config.typed import as_pasted, as_text, as_typed, quoted
from diffusion_cli.config.validate import NOT_ALLOWED, build, check_node, target
from diffusion_cli.config.words import FLAGS, overridden, sort_words

__all__ = [
    "CFG",
    "COMMANDS",
    "COMPLETION_HELP",
    "CONF",
    "EXACT",
    "FIRST_WORDS",
    "FLAGS",
    "GRIDS",
    "GROUPS",
    "HERE",
    "INFO",
    "LAUNCHERS",
    "NOT_ALLOWED",
    "SWEEPERS",
    "UNSWEPT",
    "CompareConfig",
    "Config",
    "DataConfig",
    "EMACommandConfig",
    "EMAConfig",
    "EditConfig",
    "EvalConfig",
    "ExportConfig",
    "HistoryComparison",
    "ImportConfig",
    "Measuring",
    "ModelEvaluation",
    "NewConfig",
    "PlotConfig",
    "PushConfig",
    "ReconstructionEvaluation",
    "ReportConfig",
    "RunsConfig",
    "SampleConfig",
    "SampleFilesEvaluation",
    "SamplesEvaluation",
    "SamplingSettings",
    "Sweep",
    "SweepPlan",
    "TrainConfig",
    "Value",
    "Variant",
    "allow",
    "allowing_words",
    "as_pasted",
    "as_text",
    "as_typed",
    "brought_by",
    "build",
    "check_node",
    "chosen",
    "command_help",
    "complete",
    "completion_script",
    "compose",
    "config_text",
    "defaults",
    "did_you_mean",
    "differing",
    "documented",
    "double_quoted",
    "expand",
    "fingerprint",
    "flatten",
    "folder_of_sweep",
    "group_help",
    "groups",
    "groups_asked",
    "has_best",
    "higher_is_better",
    "identity",
    "ignored_words",
    "info_text",
    "is_allowed",
    "launch",
    "launchers",
    "load",
    "load_grid",
    "load_sweep",
    "named_value",
    "objectives",
    "options",
    "overridden",
    "overview",
    "plan_sweep",
    "quoted",
    "seconds",
    "shared_seeds",
    "signature",
    "sort_words",
    "split_launcher",
    "submission_problem",
    "summary",
    "system_error",
    "target",
    "without_plugins",
]  # fmt: skip
