"""The library's tensor and expert parallelism, by the plans that the configuration declares, against one process."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tiny_models import tiny_model

CODE = """
    import sys
    import torch
    import torch.distributed as dist
    from transformers.distributed.configuration_utils import DistributedConfig
    from mai_thinking.model import MaiThinkingForCausalLM

    dist.init_process_group("gloo")
    ids = torch.arange(2, 30)[None]
    for sizes in ({"tp_size": 2}, {"tp_size": 2, "ep_size": 2}):
        models = [
            MaiThinkingForCausalLM.from_pretrained(sys.argv[1], **changes)
            for changes in ({"distributed_config": DistributedConfig(**sizes)}, {})
        ]
        with torch.no_grad():
            torch.testing.assert_close(*(model(ids).logits for model in models), atol=1e-4, rtol=1e-4)
        for model in models:
            model.train()(ids, labels=ids).loss.backward()
        split, whole = (dict(model.named_parameters()) for model in models)
        for name in split:
            gradient = split[name].grad
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            torch.testing.assert_close(gradient, whole[name].grad, atol=1e-4, rtol=1e-3, msg=f"{sizes}: {name}")
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("offset", [False, True])
def test_two_processes_compute_what_one_does(tmp_path: Path, offset: bool) -> None:
    tiny_model(vocab_size=96, offset_keys=offset).save_pretrained(tmp_path / "model")
    (tmp_path / "compare.py").write_text(textwrap.dedent(CODE))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(tmp_path / "compare.py"), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
