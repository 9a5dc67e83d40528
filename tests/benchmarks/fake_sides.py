"""Sides for benchmarks/step_trm_ml_workers.py that run in other processes."""

import time


def quick(setting):
    """Sleeps as long as the batch says, in milliseconds."""
    return {"step": lambda: time.sleep(setting.batch / 1e3)}, lambda: 12.5, {"tokens": 24}


def dies(setting):
    """Fails while it is built."""
    raise ValueError(f"no {setting.arch} here")
