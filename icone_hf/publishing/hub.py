"""Model cards made from a run's folder, and its uploads to the Hub."""

import csv
import importlib.util
import json
import os
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from .checkpoint_info import (
    BEFORE_TRAINING,
    count,
    describe,
    describe_projections,
    extras_of,
    measured,
    merge_formula,
    other_measures,
    settings_of,
)

TEMPLATE = Path(__file__).with_name("model_card.md")
CARD = "README.md"
MADE_BY_US = "<!-- Made by icone_hf."  # marks a card that may be written over
UPLOAD_FOLDER = "upload"  # what is being uploaded while a run goes on
# Only the run itself needs these files to go on, and they are many times as large as the model.
LEFT_BEHIND = ["stages/**", "feature_cache/**", "runs/**", f"{UPLOAD_FOLDER}/**", "emissions.csv"]
EPOCHS_PICTURE, EXAMPLES_PICTURE = "validation_rsum.png", "retrieval.png"
PICTURES = {EPOCHS_PICTURE: "Validation Rsum after each epoch", EXAMPLES_PICTURE: "What the model retrieves"}
METRICS = {
    "t2i_r1": "text to image R@1",
    "t2i_r5": "text to image R@5",
    "t2i_r10": "text to image R@10",
    "i2t_r1": "image to text R@1",
    "i2t_r5": "image to text R@5",
    "i2t_r10": "image to text R@10",
    "rsum": "Rsum",
}


def model_card(folder: str | os.PathLike, repo_id: str | None = None, license: str | None = None) -> ModelCard:
    """Make a checkpoint's model card.

    It tells what the config, the weights, `recipe.json`, `metrics.json`, the epochs and the figures say.

    Args:
        folder: of the checkpoint.
        repo_id: what the examples load. Default: the folder's name.
        license: of the model, by the Hub's name for it. Default: `other`, since the towers' licences hold too.

    Raises:
        ValueError: if the folder holds no checkpoint of IConE.
    """
    folder = Path(folder)
    info = describe(folder)
    name = (repo_id or folder.resolve().name).rsplit("/", 1)[-1]
    towers = info["vision_tower"]["name"], info["text_tower"]["name"]
    data, carbon = info["data"] or "training data", carbon_of(folder)
    rows = [(of or data, split, values) for of, split, values in measured(info)]
    # The Hub reads the metrics, the data and the towers from the card's header.
    results = [
        EvalResult(
            task_type="image-text-retrieval",
            task_name="Image-text retrieval",
            dataset_type=of,
            dataset_name=of,
            dataset_split=split,
            metric_type=metric,
            metric_name=f"{label} ({split})",
            metric_value=round(values[metric], 2),
        )
        for of, split, values in rows
        for metric, label in METRICS.items()
    ]
    card_data = ModelCardData(
        model_name=name,
        license=license or "other",
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["icone", "image-text-retrieval", "cross-modal-retrieval", "sentence-transformers"],
        datasets=[data] if _is_id(data) else None,
        base_model=[tower for tower in towers if _is_id(tower)] or None,
        eval_results=results or None,
    )
    if carbon is not None:
        card_data["co2_eq_emissions"] = {"emissions": 1000 * carbon, "source": "codecarbon"}  # grams
    # People read the same from the template's text, and what the model was before: no metric of this one.
    before = [(data, BEFORE_TRAINING, info["before_training"])] if info["before_training"] else []
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        model_name=name,
        repo_id=repo_id or name,
        info=info,
        rows=before + rows,
        figures=[{"file": file, "what": what} for file, what in PICTURES.items() if (folder / file).is_file()],
        carbon=carbon,
        licences={side: licence_of(info[f"{side}_tower"]["name"]) for side in ("vision", "text")},
        count=count,
        merge_formula=merge_formula,
        projections=describe_projections(info),
        extras={stage["name"]: extras_of(stage) for stage in info["stages"]},
        settings=settings_of(info),
        other_measures=other_measures(info),
    )


def write_card(folder: str | os.PathLike, repo_id: str | None = None, license: str | None = None) -> None:
    """Save a checkpoint's card as its README.md.

    The figure of its epochs is saved too, where matplotlib is installed. A card that somebody has written is kept.

    Raises:
        ValueError: as [`model_card`].
    """
    folder = Path(folder)
    if (epochs := rsum_of_epochs(folder)) and importlib.util.find_spec("matplotlib"):  # an extra
        from ..evaluation.figures import sweep_chart

        by_epoch = {stage: {number: [rsum] for number, rsum in values.items()} for stage, values in epochs.items()}
        sweep_chart(by_epoch, "epoch", "validation Rsum").savefig(folder / EPOCHS_PICTURE)
    card = model_card(folder, repo_id, license)
    if not (folder / CARD).is_file() or MADE_BY_US in (folder / CARD).read_text():
        card.save(folder / CARD)


def push(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    license: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a checkpoint with its model card.

    The folders of the stages and the feature cache stay behind. A card that somebody has written is kept.

    Args:
        folder: of the checkpoint.
        repo_id: made if it does not exist.
        private: whether a repository that is made is private.
        license: see [`model_card`].
        revision: branch to commit to; made if it does not exist.
        token: default: the one that `hf auth login` has left.

    Returns:
        The address of the commit.

    Raises:
        ValueError: if the folder holds no checkpoint of IConE.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses.
    """
    write_card(folder, repo_id, license)  # refuses a folder that is no checkpoint, before anything is made on the Hub
    repo_id = make_repository(repo_id, private, revision, token)
    commit = HfApi(token=token).upload_folder(
        repo_id=repo_id,
        folder_path=Path(folder),
        revision=revision,
        commit_message="Upload an IConE checkpoint",
        ignore_patterns=LEFT_BEHIND,
    )
    return commit.commit_url


def make_repository(
    repo_id: str, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> str:
    """Make a repository and a branch, unless they exist.

    A training run does this first, so that a wrong token or name shows before the work.

    Args:
        repo_id: of the repository. Without an owner it is the token's user's.
        private: whether a repository that is made is private.
        revision: the branch. `None`: no branch is made.
        token: default: the one that `hf auth login` has left.

    Returns:
        The repository's whole name, with its owner.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def _is_id(tower: str | None) -> bool:
    """Tell whether a name is one on the Hub.

    The other names are folders of whoever trained the model.
    """
    return tower is not None and tower.count("/") == 1 and not tower.startswith((".", "/")) and not Path(tower).exists()


def rsum_of_epochs(folder: str | os.PathLike) -> dict[str, dict[float, float]]:
    """Read each stage's validation Rsum by epoch.

    Stages that were measured only once are left out.
    """
    stages = {}
    for file in sorted(Path(folder).glob("stages/*/stage.json")):  # folders are named NUMBER-STAGE
        logs = json.loads(file.read_text())["log_history"]
        stages[file.parent.name.partition("-")[2]] = {
            round(entry["epoch"], 2): entry["eval_rsum"] for entry in logs if "eval_rsum" in entry
        }
    return {stage: values for stage, values in stages.items() if len(values) > 1}


def carbon_of(folder: str | os.PathLike) -> float | None:
    """Sum up the kilograms of CO2 of all stages.

    It is `None` for a run without `report_to=codecarbon`.
    """
    files = [*Path(folder).glob("emissions.csv"), *Path(folder).glob("stages/*/emissions.csv")]
    if not files:
        return None
    rows = [row for file in files for row in csv.DictReader(file.read_text().splitlines())]
    return sum(float(row["emissions"]) for row in rows)


def licence_of(tower: str | None) -> str | None:
    """Read the licence on a tower's own card.

    The card is in the tower's folder or on the Hub. `None`: there is no card, it can't be reached, or it states no
    licence.
    """
    if tower is None or not (_is_id(tower) or Path(tower, CARD).is_file()):
        return None
    try:
        # A folder has its README.md; the card of an id is downloaded, or found in the cache.
        data = ModelCard.load(str(Path(tower, CARD)) if Path(tower).is_dir() else tower).data
    except (OSError, ValueError):  # no such card or no connection; a file that is no card
        return None
    return data.get("license_name") if data.license == "other" else data.license
