"""What a run will be, fixed when it begins and checked whenever it goes on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from privlm.config import ConfigError, TrainConfig
from privlm.materials import Materials, candidates
from privlm.privacy import check_batch_size, make_plan
from privlm.progress import Watch
from privlm.run_folder import RunFolder, RunRecord
from protocols.randomness import Stream

CALIBRATION_SLACK = 1e-3
"""ε of a plan calibrated by another version of the accountant may differ by this share."""


def new_record(config: TrainConfig, materials: Materials, watch: Watch) -> RunRecord:
    """Fix what a run is, before anything is trained.

    Raises:
        ValueError: there is no such plan.
    """
    drawn = candidates(materials.private, config.privacy)
    check_batch_size(config.batch_size, drawn)
    plan = None
    if config.privacy is not None:
        with watch("planning the noise", 1):
            plan = make_plan(
                config.privacy,
                candidates=drawn,
                epochs=config.epochs,
                batch_size=config.batch_size,
                users_known=True,
            )
    dataset, all_records = _fingerprints(materials)
    return RunRecord(
        run=Stream.fresh("run id").bytes(8).hex(),
        dataset=dataset,
        corpus=all_records,
        config=config,
        plan=plan,
        ledger=str(Path(config.ledger).absolute()) if config.ledger else None,
    )


def _fingerprints(materials: Materials) -> tuple[str, str]:
    """Of the private records, which names them in the ledger, and of all records."""
    private = materials.private.fingerprint()
    public = "" if materials.public is None else materials.public.fingerprint()
    together = private + public + materials.held_out.examples.fingerprint()
    return private, hashlib.sha256(together.encode()).hexdigest()


def check_record(record: RunRecord, materials: Materials, folder: RunFolder) -> None:
    """Refuse documents that changed, and a plan that the configuration would not have made."""
    dataset, all_records = _fingerprints(materials)
    if (record.dataset, record.corpus) != (dataset, all_records):
        raise ConfigError(
            f"{folder.record}: the documents changed since the run was started; restore them, "
            "or start anew in another --out"
        )
    config, plan = record.config, record.plan
    if config.privacy is None and plan is None:
        return
    if config.privacy is not None and plan is not None:
        expected = make_plan(
            msgspec.structs.replace(
                config.privacy, target_epsilon=None, noise_multiplier=plan.noise_multiplier
            ),
            candidates=candidates(materials.private, config.privacy),
            epochs=config.epochs,
            batch_size=config.batch_size,
            users_known=True,
        )
        target = config.privacy.target_epsilon
        if plan == expected and (
            plan.noise_multiplier == config.privacy.noise_multiplier
            if target is None
            else plan.guarantee().epsilon <= target * (1 + CALIBRATION_SLACK)
        ):
            return
    raise ConfigError(
        f"{folder.record}: damaged, because its plan does not follow from its configuration; "
        "restore it from a backup, or start anew in another --out"
    )
