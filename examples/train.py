"""Trains IConE on a source of captioned pictures, tests it, and leaves a checkpoint folder.

accelerate launch examples/train.py examples/configs/quickstart.yaml [--any_argument value]
"""

from accelerate import PartialState
from transformers import set_seed

from icone_hf import IConEModel, IConEProcessor, IConETrainer, IConETrainingArguments, load_groups
from icone_hf.arguments import DataArguments, ModelArguments, RecipeArguments, parse_arguments
from icone_hf.groups import MissingSplitError, check_disjoint
from icone_hf.retrieval import metrics_table
from icone_hf.run_folder import write_metrics


def main() -> None:
    model_args, data_args, recipe_args, args = parse_arguments(
        (ModelArguments, DataArguments, RecipeArguments, IConETrainingArguments)
    )
    print(f"Process {args.process_index + 1} of {args.world_size} on {args.device}.", flush=True)
    stages = recipe_args.parse()

    splits = {}
    for split in ("train", "validation", "test"):
        try:
            with PartialState().main_process_first():  # the others read what the first has downloaded or drawn
                splits[split] = load_groups(**data_args.load_arguments(split))
        except MissingSplitError:
            if split != "test":
                raise
            print(f"{data_args.source} has no test split: the model will be validated only.")
    check_disjoint(splits)

    set_seed(args.seed)
    towers = model_args.vision_model_name_or_path, model_args.text_model_name_or_path
    processor = IConEProcessor.from_encoders(*towers)
    model = IConEModel.from_encoders(*towers, num_groups=len(splits["train"]), **model_args.config())
    trainer = IConETrainer(model, args, splits["train"], splits["validation"], processor, stages)
    metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if "test" in splits and "test" not in metrics:
        test = trainer.evaluate(splits["test"])
        if PartialState().is_main_process:
            metrics = write_metrics(args.output_dir, {"test": test})
    if PartialState().is_main_process:
        rows = {f"validation, after {name}": stage for name, stage in metrics["stages"].items()}
        if "test" in metrics:
            rows["test"] = metrics["test"]
        print(metrics_table(rows))
        print(f"Checkpoint, metrics.json and recipe.json: {args.output_dir}")


if __name__ == "__main__":
    main()
