"""`icone tune`: a small search for rates, losses and temperatures, on frozen towers."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from ..data.groups import check_disjoint
from ..errors import InputError
from ..modeling.configuration_icone import IConEConfig
from ..training.arguments import DECISIVE_ARGUMENTS, IConETrainingArguments
from ..training.search_space import (
    DEFAULT_SPACE,
    all_candidates,
    check_values,
    draw_candidates,
    parse_space,
    tunable_fields,
)
from ..training.trials import Trials
from ..training.tuning import RESULT_FILE, TRIALS_FILE, Result, Search, plan_rungs, trials_table
from . import COMMANDS
from .arguments import SOURCE, DataArguments, ModelArguments, OutputArguments, RecipeArguments
from .loading import join_processes, load_for_training
from .parsing import parse_arguments
from .starting import CHANGEABLE, check_changes, start_model, start_processor

BEST_FILE = "best.yaml"


@dataclass
class TuneArguments:
    """Hold how `icone tune` searches."""

    _argument_group_name = "search"

    space: str | None = field(
        default=None,
        metadata={
            "help": "YAML file with the fields to vary: 'field: [value, ...]' or 'field: {min: ..., max: ..., log: "
            "true}'. Default: rates, temperatures, losses and more."
        },
    )
    trials: str = field(
        default="27", metadata={"help": "Candidates drawn from the space, or all: every combination of its lists."}
    )
    max_epochs: int = field(default=9, metadata={"help": "Epochs of the last rung."})
    eta: int = field(
        default=3, metadata={"help": "From rung to rung, 1 / eta of the candidates train for eta times the epochs."}
    )
    final_seeds: int = field(
        default=1, metadata={"help": "Train the best eta candidates from this many seeds; the mean decides."}
    )

    def __post_init__(self) -> None:
        if self.trials != "all" and not (self.trials.isdigit() and int(self.trials)):
            raise InputError(f"trials={self.trials!r} must be a number above 0, or all.")
        if self.final_seeds < 1:
            raise InputError(f"final_seeds={self.final_seeds} must be 1 or more.")
        plan_rungs(1, self.eta, self.max_epochs)

    def read_space(self) -> Mapping[str, Any]:
        """Read the space's file, if there is one."""
        if self.space is None:
            return DEFAULT_SPACE
        path = Path(self.space)
        if not path.is_file():
            raise InputError(f"space={self.space} does not exist.")
        try:
            return yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"space={self.space} can't be read as YAML: {' '.join(str(error).split())}") from error


def tune(argv: Sequence[str]) -> None:
    """Run `icone tune SOURCE [FILE.yaml] [--argument value ...]`: search, and leave the YAML of the best."""
    model_args, data_args, recipe_args, tune_args, args, output = parse_arguments(
        (ModelArguments, DataArguments, RecipeArguments, TuneArguments, IConETrainingArguments, OutputArguments),
        argv,
        prog="icone tune",
        positionals={"source": SOURCE},
        description=COMMANDS["tune"],
    )
    stage = recipe_args.parse()[0]
    # A checkpoint keeps what computes its embeddings.
    of_model = asdict(model_args) if model_args.model is None else CHANGEABLE
    known = tunable_fields(name for name in of_model if name in {one.name for one in fields(IConEConfig)})
    space = parse_space(tune_args.read_space(), known)
    join_processes()
    log = sys.stderr if output.json else sys.stdout  # a program reads stdout

    # Load what the trials share. The test split isn't looked at.
    splits, data_args, _ = load_for_training(data_args, None, log, names=("train", "validation"))
    check_disjoint(splits)
    args.feature_cache_dir = args.feature_cache_dir or os.path.join(str(args.output_dir), "feature_cache")
    if model_args.model is not None:
        check_changes(model_args)
    trials = Trials(
        lambda config: start_model(replace(model_args, **config), recipe_args, splits["train"], is_sharded=False),
        args,
        splits["train"],
        splits["validation"],
        start_processor(model_args),
        stage,
        data_args.source,
    )

    # Draw candidates. Of the built-in space the first is the recipe as it is, which may not bear every value.
    if tune_args.space is not None:
        check_values(space, trials.check)
    if tune_args.trials == "all":
        candidates = all_candidates(space, trials.check)
    else:
        first = trials.own_values(space) if tune_args.space is None else None
        candidates = draw_candidates(space, int(tune_args.trials), args.seed, trials.check, first)
    trials.check_teachers(candidates)
    rungs = plan_rungs(len(candidates), tune_args.eta, tune_args.max_epochs)
    settings = {"space": {name: repr(values) for name, values in space.items()}, "trials": tune_args.trials}
    key = {**trials.key(), **settings, "eta": tune_args.eta, "max_epochs": tune_args.max_epochs}
    folder = Path(str(args.output_dir))
    search = Search(folder, key, candidates, rungs, args.seed, trials.run)
    plan = ", then ".join(f"{rung.candidates} for {rung.epochs} epochs" for rung in rungs)
    print(f"{len(candidates)} candidates: {plan}.", flush=True, file=log)

    # Search, and say what came out.
    trials.fill_caches()
    result = search.search(tune_args.final_seeds)
    best = best_arguments(result, candidates, trials, model_args, recipe_args, data_args)
    text = f"# Found by icone tune: validation Rsum {_mean(result.rsums):.1f}. Run it by icone train FILE.\n"
    (folder / BEST_FILE).write_text(text + yaml.safe_dump(best, sort_keys=False))
    shown = trials_table(result.last_trials(), rungs)
    shown += f"\nBest: candidate {result.best}, validation Rsum {_mean(result.rsums):.1f}"
    shown += f" (mean of {len(result.rsums)} seeds)" if len(result.rsums) > 1 else ""
    shown += f"\nTrain it: icone train {folder / BEST_FILE}\nAll trials: {folder / RESULT_FILE}, {folder / TRIALS_FILE}"
    facts = {"out": args.output_dir, "best": best, "candidate": result.best, "rsums": result.rsums}
    output.print({**facts, "trials": [asdict(trial) for trial in result.trials]}, shown)


def best_arguments(
    result: Result,
    candidates: Sequence[Mapping[str, Any]],
    trials: Trials,
    model_args: ModelArguments,
    recipe_args: RecipeArguments,
    data_args: DataArguments,
) -> dict[str, Any]:
    """Return the arguments that train the best candidate.

    They are for `icone train`; what is at its default is left out.
    """
    stage, config, _ = trials.applied(candidates[result.best])
    epochs = max(trial.epochs for trial in result.trials if trial.candidate == result.best)
    model = asdict(model_args)
    if model_args.model is None:
        # A list of stages has no config of its own. So what came with the recipe's name is written out, as the best had
        # it, and whose projections it takes.
        of_best = trials.make_model(config).config
        model |= {name: getattr(of_best, name) for name in recipe_args.config()}
        model["projections"] = model_args.projections or recipe_args.default_projections
    # What decides a run's numbers, all that we add to transformers' arguments, and what makes it faster.
    ours = {one.name for one in fields(IConETrainingArguments)} - {one.name for one in fields(TrainingArguments)}
    chosen = {*DECISIVE_ARGUMENTS, *ours, "per_device_train_batch_size", "per_device_eval_batch_size"}
    chosen |= {"dataloader_num_workers", "use_cpu"}
    arguments = trials.arguments(candidates[result.best]).to_dict()
    return {
        **_given(DataArguments, asdict(data_args)),
        **_given(ModelArguments, {**model, **config}),
        "stages": [{**asdict(trials.stage), **stage, "num_train_epochs": epochs}],
        **_given(IConETrainingArguments, {name: value for name, value in arguments.items() if name in chosen}),
        "output_dir": os.path.join(str(trials.args.output_dir), "best"),
    }


def _given(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is at its default."""
    defaults = {
        one.name: one.default if one.default_factory is MISSING else one.default_factory() for one in fields(kind)
    }
    return {name: value for name, value in values.items() if value != defaults[name]}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
