"""What a user of the model can mend: a config, a tower or a checkpoint that can't be used as asked.

This file travels with a checkpoint. `icone_hf/errors.py` is its twin for the rest of the package.
"""


class ModelError(ValueError):
    """Report a config, tower or checkpoint that can't serve."""


class MissingWeightsError(RuntimeError, ModelError):
    """Report weights that aren't those of the config."""


class MissingAdaptersPackageError(ImportError, ModelError):
    """Report that peft isn't installed."""
