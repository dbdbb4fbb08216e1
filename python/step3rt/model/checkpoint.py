"""Owns a model directory as a whole: configuration and tensors, checked against each other."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from step3rt.model.config import Step3Config
from step3rt.model.tensor_files import TensorFiles
from step3rt.model.tensor_plan import check_tensors
from step3rt.model.tensor_samples import sample_digests


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model directory whose headers are known to be those of a Step-3 model."""

    directory: Path
    config: Step3Config
    files: TensorFiles

    @classmethod
    def open(cls, directory: Path) -> "Checkpoint":
        """Reads config.json and every header; reads and allocates no tensor.

        Raises:
            ConfigError: config.json cannot be used.
            CheckpointError: a file or tensor is missing, misshapen, truncated or extra.
        """
        config = Step3Config.from_directory(directory)
        files = TensorFiles.open(directory)
        check_tensors(files, config)
        return cls(directory, config, files)

    def fingerprint(self) -> str:
        """Returns a SHA-256 in hex of config.json and each tensor's name, dtype, shape and samples.

        Instances of one cluster must agree on it. Samples are a few KiB of each tensor's values
        (`tensor_samples`): another training run, a fine-tune of any tensor that changes more than
        single values, and a file whose end has not arrived are told apart; a flipped byte or a
        damaged part between samples is not, which is for checksums of files.

        Raises:
            CheckpointError: a file cannot be read any more.
        """
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        samples = sample_digests(self.files.entries)
        for name, entry in sorted(self.files.entries.items()):
            digest.update(json.dumps([name, entry.dtype, entry.shape, entry.num_bytes]).encode())
            digest.update(samples[name])
        return digest.hexdigest()


def describe_checkpoint(directory: Path) -> str:
    """Checks a model directory and describes it in one line, with what hosts must agree on.

    Raises:
        ConfigError: it cannot be used; the message names file and tensor.
    """
    checkpoint = Checkpoint.open(directory)
    config, entries = checkpoint.config, checkpoint.files.entries.values()
    num_bytes = sum(entry.num_bytes for entry in entries)
    num_moe_layers = sum(layer.is_moe for layer in config.layers)
    dtypes = ", ".join(sorted({entry.dtype for entry in entries}))
    return (
        f"{directory.name}: {config.num_layers} layers ({num_moe_layers} with "
        f"{config.num_experts} experts), hidden {config.hidden_size}, {dtypes}, "
        f"{num_bytes / 1e6:.1f} MB, fingerprint {checkpoint.fingerprint()}"
    )
