"""Hydra's sweepers and launchers, with jobs that this package composes; by private APIs, tested with Hydra 1.3.

This module imports Hydra, so that its classes can be sent to other processes: import it where a sweep starts.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from diffusion_cli.config.catalogue import CONF
from diffusion_cli.config.hydra_words import is_of_hydra
from diffusion_cli.system.compat import parse_override

Words = Sequence[str]
Work = Callable[[int, list[str]], Any]
"""Runs a job by its number and its words."""


class Returned(NamedTuple):
    """What a job returned, perhaps from another process."""

    words: list[str]
    value: Any
    error: Exception | None


class WordsLoader(ConfigLoaderImpl):
    """Composes Hydra's own settings only: other words stay as they are, for the checks of this package."""

    def __init__(self) -> None:
        super().__init__(create_config_search_path(str(CONF)))

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        own = [text for text in overrides if is_of_hydra(text) or _chooses_experiment(text)]
        config = super().load_configuration(config_name, own, run_mode, from_shell, validate_sweep_overrides)
        with open_dict(config.hydra):
            config.hydra.overrides.task = [text for text in overrides if not is_of_hydra(text)]
        return config


class QuietReturn(JobReturn):
    """What a job returned; a failure is raised without Hydra's own line."""

    @property
    def return_value(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - Hydra sets no such object
        if self.status == JobStatus.FAILED:
            raise self._return_value
        return self._return_value


class WatchedLauncher(Launcher):
    """A launcher that passes on what its jobs returned, with the number of the first of them."""

    def __init__(self, launcher: Launcher, returned: Callable[[int, Sequence[Returned]], None]) -> None:
        self.launcher, self.returned = launcher, returned

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Part of Hydra's interface; the launcher is set up already."""

    def launch(self, job_overrides: Sequence[Words], initial_job_idx: int) -> Sequence[JobReturn]:
        returns = [
            QuietReturn(**{field.name: getattr(done, field.name) for field in fields(JobReturn)})
            for done in self.launcher.launch(job_overrides, initial_job_idx=initial_job_idx)
        ]
        found = [Returned([*(done.overrides or ())], done._return_value, error_of(done)) for done in returns]
        self.returned(initial_job_idx, found)
        return returns


def _chooses_experiment(text: str) -> bool:
    """Return whether a word chooses one experiment, which may have settings of Hydra."""
    return text.startswith("experiment=") and not parse_override(text).is_sweep_override()


def hydra_config(command: str | None, words: Words) -> DictConfig:
    """Return Hydra's own settings for a sweep, with those of an experiment of a command.

    Raises exceptions of Hydra and OmegaConf for wrong words.
    """
    version.setbase("1.3")
    setup_globals()
    JobRuntime.instance().set("name", "diffuse")
    return WordsLoader().load_configuration(command, list(words), RunMode.MULTIRUN)


def installed(group: str) -> dict[str, Any]:
    """Return the settings of each option of a group of Hydra that is defined in code, as those of plugins are."""
    Plugins.instance()  # their modules register the options
    store = ConfigStore.instance()
    if store.get_type(group) != ObjectType.GROUP:
        return {}
    files = [name for name in store.list(group) if name.endswith(".yaml")]
    return {
        name.removesuffix(".yaml"): OmegaConf.to_container(store.load(f"{group}/{name}").node)
        for name in files
    }


def own_settings(config: DictConfig, resolve: bool) -> dict[str, Any]:
    """Return Hydra's settings in a configuration as plain data, without the texts of its help."""
    HydraConfig.instance().set_config(config)
    plain = OmegaConf.to_container(config.hydra, resolve=resolve, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key not in ("help", "hydra_help")}


def print_info(what: str, command: str, words: Words) -> None:
    """Print what Hydra knows of a command: `defaults`, `defaults-tree`, `plugins` or `searchpath`."""
    version.setbase("1.3")
    hydra = Hydra.create_main_hydra2("diffuse", create_config_search_path(str(CONF)))
    try:
        hydra.show_info(what, config_name=command, overrides=list(words))
    finally:
        GlobalHydra.instance().clear()


def run_jobs(
    config: DictConfig, words: Words, work: Work, returned: Callable[[int, Sequence[Returned]], None]
) -> None:
    """Let Hydra's sweeper choose jobs, and its launcher run them.

    Args:
        config: what `hydra_config` returned.
        words: words of the jobs; some have several values.
        work: called for each job, perhaps in another process.
        returned: called in this process after each batch of jobs.
    """
    plugins, context = Plugins.instance(), HydraContext(config_loader=WordsLoader(), callbacks=Callbacks())
    launcher = plugins.instantiate_launcher
    vars(plugins)["instantiate_launcher"] = lambda **settings: WatchedLauncher(launcher(**settings), returned)
    try:
        sweeper = plugins.instantiate_sweeper(
            config=config, hydra_context=context, task_function=partial(_job, work)
        )
    finally:
        del vars(plugins)["instantiate_launcher"]  # the instance is sent to other processes
    logging.getLogger("optuna").setLevel(logging.WARNING)
    logging.getLogger("hydra_plugins").addHandler(logging.NullHandler())  # failures are reported by the jobs
    sweeper.sweep(arguments=[*words])


def _job(work: Work, _: DictConfig) -> Any:
    """Call `work` with the number and the words of the job that Hydra has started."""
    hydra = HydraConfig.get()
    return work(int(hydra.job.num), [*hydra.overrides.task])


def error_of(done: JobReturn) -> Exception | None:
    """Return the exception that ended a job; None if it has finished."""
    return done._return_value if done.status == JobStatus.FAILED else None
