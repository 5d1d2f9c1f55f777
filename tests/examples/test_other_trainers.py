"""``examples/hf_trainer.py`` and ``examples/timm_train.py``."""

from __future__ import annotations

import runpy
import sys

import pytest
from train_cases import EXAMPLES

from vitreg_kernels.monitor import read_csv


def test_hf_trainer(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import hf_trainer

    found = hf_trainer.main(["--steps=26", f"--output={tmp_path}"])
    assert 0.0 < found["eval_accuracy"] <= 1.0
    rows = [(step, row) for step, row in read_csv(tmp_path / "norms.csv") if row.group == "patches"]
    assert [step for step, _ in rows] == 4 * [25]
    assert all(row.count > 0 for _, row in rows)


def test_timms_script_gets_patched_models(tmp_path, monkeypatch, capsys):
    from timm import models

    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from timm.models import create_model\n"
        "if __name__ == '__main__':\n"
        "    create_model(sys.argv[1], img_size=28, depth=2)\n"
    )
    monkeypatch.setattr(models, "create_model", models.create_model)  # given back in the end
    monkeypatch.setattr(sys, "argv", ["timm_train.py", str(script), "vit_small_patch14_reg4_dinov2"])
    runpy.run_path(str(EXAMPLES / "timm_train.py"), run_name="__main__")
    assert "2 x Attention (blocks.0.attn to blocks.1.attn): patched" in capsys.readouterr().out
