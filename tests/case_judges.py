"""What is expected of the cases that `run_cases` runs: a judge for each by its name."""

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Seen:
    """What a case printed (standard output and error together), and its exit code (None: out of time)."""

    text: str
    code: int | None

    @property
    def codes(self) -> list[int]:
        """The exit codes that the case itself reports, in order."""
        return [int(code) for code in re.findall(r"exit(?: code)? (\d+)", self.text)]

    def after(self, label: str) -> str:
        """The text behind the first `label`."""
        return self.text.partition(label)[2]


Judge = Callable[[Seen], None]
"""Asserts what is expected; the assertion's message is what is wrong."""
JUDGES: dict[str, Judge] = {}


def judges(name: str) -> Callable[[Judge], Judge]:
    """Register what judges the case `name`."""

    def register(judge: Judge) -> Judge:
        JUDGES[name] = judge
        return judge

    return register


def exits_with(*codes: int) -> Judge:
    """The case reports just these exit codes."""

    def judge(seen: Seen) -> None:
        assert seen.codes == list(codes), f"exit codes {seen.codes}, not {list(codes)}"

    return judge


@judges("01-special-token-in-evaluation")
def _(seen: Seen) -> None:
    bits = [float(number) for number in re.findall(r"(?:spelled|near)\.txt.*?(\d+\.\d{2,})", seen.text)]
    assert len(bits) == 2, f"no bits per byte of both files: {bits}"
    assert max(bits) < 1.3 * min(bits), f"bits per byte differ: {bits}"


@judges("02-locale")
def _(seen: Seen) -> None:
    exits_with(0, 0, 0)(seen)
    assert len(re.findall(r"^final$", seen.text, re.M)) == 2, "no final/"


@judges("03-closed-pipe")
def _(seen: Seen) -> None:
    found = re.search(r"exit code (\d+), (\d+) bytes on stderr, (\d+) steps, checkpoints: (.*)", seen.text)
    assert found, "nothing reported"
    code, told, steps, checkpoints = int(found[1]), int(found[2]), int(found[3]), found[4]
    assert (code == 0 and steps >= 60) or (code == 75 and told and "step-" in checkpoints), found[0]


@judges("04-sighup")
def _(seen: Seen) -> None:
    assert re.search(r"exit code 75; checkpoints: step-", seen.text), seen.text[-200:]


@judges("05-numbers-on-the-command-line")
def _(seen: Seen) -> None:
    exits_with(*[2] * 9)(seen)


@judges("06-duplicate-keys")
def _(seen: Seen) -> None:
    assert re.search(r"line \d+: .*given twice", seen.text), "the key that is given twice is not told"
    assert 0 not in seen.codes, "trained all the same"


@judges("07-dropped-documents")
def _(seen: Seen) -> None:
    assert all(int(n) for n in re.findall(r":(\d+)$", seen.text, re.M)), "not in the log and the report"


@judges("08-files-passed-over")
def _(seen: Seen) -> None:
    assert seen.codes == [2] and "dangling.jsonl" in seen.text, "a dangling link is no error"


@judges("11-deep-json")
def _(seen: Seen) -> None:
    exits_with(2, 2, 2)(seen)
    assert re.search(r"data.jsonl, line \d+.*nested", seen.text), "the line is not named"


@judges("14-parquet")
def _(seen: Seen) -> None:
    parts = re.split(r"^(dictionary|string_view|duplicate|folder):$", seen.text, flags=re.M)
    codes = {name: Seen(text, 0).codes for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    assert codes["dictionary"] == codes["string_view"] == [0], f"strings are not read: {codes}"
    assert codes["duplicate"] == codes["folder"] == [2], f"not refused: {codes}"
    assert re.search(r"\.parquet", seen.after("folder:")), "the shard is not named"


@judges("15-giant-document-in-a-stream")
def _(seen: Seen) -> None:
    times = [float(number) for number in re.findall(r"MB: ([\d.]+) ms", seen.text)]
    assert len(times) == 3 and times[2] < 4 * times[0], f"ms a row at 0.25, 1 and 4 MB: {times}"


@judges("16-bad-line-in-mid-run")
def _(seen: Seen) -> None:
    found = re.search(r"steps: (\d+), checkpoints: .*step-0*(\d+)\s*$", seen.text)
    assert seen.codes == [2] and re.search(r"line \d+", seen.text), "the line is not named, exit code 2"
    assert found and found[1] == found[2], "the last whole step is not saved"


@judges("18-top-1-router")
def _(seen: Seen) -> None:
    gradient = re.search(r"k=1: router gradient of the loss (\S+)", seen.text)
    learns = gradient is not None and float(gradient[1]) > 1e-3
    assert learns or seen.codes[-1:] == [2] or seen.codes == [2, 2], "k = 1 learns from the balance loss alone"


@judges("19-tokenizer-with-a-gap")
def _(seen: Seen) -> None:
    gap, lossy = Seen(seen.after("exit code 0").partition("lossy:")[0], 0), Seen(seen.after("lossy:"), 0)
    assert gap.codes in ([0], [2]), f"gap: exit codes {gap.codes}"
    bits = re.search(r"chinese\.txt.*?(\d+\.\d+)", lossy.text)
    assert lossy.codes[:1] == [2] or (bits and float(bits[1]) > 0.3), "a tokenizer that loses text is accepted"


@judges("20-tokenizer-of-a-checkpoint")
def _(seen: Seen) -> None:
    assert seen.codes[-1:] == [0], "following the advice fails"


@judges("21-model-file-0600")
def _(seen: Seen) -> None:
    modes = re.findall(r"^(\d{3}) (\S+)$", seen.text, re.M)
    assert modes and all(mode in ("644", "755") for mode, _ in modes), f"modes: {modes}"
    assert "cannot be loaded" not in seen.text, "others cannot read it"


@judges("22-folders-of-others")
def _(seen: Seen) -> None:
    assert seen.codes[:3] == [2, 2, 2], f"exit codes {seen.codes}"
    assert len(re.findall(r"error: .*output_dir", seen.text)) >= 3, "the key is not named"


@judges("23-full-disk-in-preparation")
def _(seen: Seen) -> None:
    exits_with(2)(seen)
    assert "no space left" in seen.text, "not told"


@judges("26-long-tmpdir")
def _(seen: Seen) -> None:
    assert seen.codes == [0] or (seen.codes == [2] and "TMPDIR" in seen.text), f"exit codes {seen.codes}"


@judges("30-bf16-folder-loads-as-fp32")
def _(seen: Seen) -> None:
    assert re.search(r"config.json: bfloat16 .*after: torch.bfloat16$", seen.text, re.M), seen.text[-200:]


@judges("32-crlf-text")
def _(seen: Seen) -> None:
    (size,) = re.findall(r"(\d+) bytes in the file", seen.text)
    assert re.search(rf"crlf\.txt .*\b{size}$", seen.text, re.M), f"the file's {size} bytes are not what is measured"


@judges("33-one-line-a-rank")
def _(seen: Seen) -> None:
    exits_with(2)(seen)
    assert seen.text.count("batch.global_batch_size") == 1, "not told once, with the key"
    assert seen.text.count("error:") == 1, "told more than once"


@judges("34-broken-config-yaml")
def _(seen: Seen) -> None:
    exits_with(0, 2, 2)(seen)
    assert seen.text.count("damaged") == 2, "the damaged file is not named"


@judges("duplicates-dropped-silently")
def _(seen: Seen) -> None:
    assert re.search(r"uplicat|conflict|contradict", seen.text), "not told"
    assert "UsageError" in seen.text or seen.text.count("capital letters") >= 5, "questions differing in case are lost"


@judges("false-collapse")
def _(seen: Seen) -> None:
    assert seen.codes[:1] == [0] and "collapsed" not in seen.text, f"exit codes {seen.codes}"


@judges("gym-fixed-size")
def _(seen: Seen) -> None:
    assert len(seen.codes) == 3 and set(seen.codes) <= {0, 2}, f"exit codes {seen.codes}"
    assert "options" not in seen.text.partition("\n")[0], "blames an option that nobody gave"


@judges("gym-unsound-verifiers")
def _(seen: Seen) -> None:
    assert "UsageError" in seen.text or seen.code or re.search(r"'banana' +paid 0/60", seen.text), "banana is paid"


@judges("jsonl-line-separators")
def _(seen: Seen) -> None:
    assert not re.search(r"error|not JSON", seen.text), "not read"


@judges("lone-surrogate")
def _(seen: Seen) -> None:
    exits_with(2, 2)(seen)


@judges("math-answers")
def _(seen: Seen) -> None:
    found = re.search(r"false accepts (\d+), false rejects (\d+)", seen.text)
    assert found and int(found[1]) == 0 and int(found[2]) <= 2, found and found[0]


@judges("numbers-out-of-range")
def _(seen: Seen) -> None:
    exits_with(2, 2, 2)(seen)
    for key in ("rollouts.temperature", "evaluation.temperature", "reward.w_length"):
        assert re.search(rf"error: .*{key}", seen.text), f"{key} is not named"


@judges("overlong-prompt")
def _(seen: Seen) -> None:
    assert seen.codes == [0] or (seen.codes == [2] and "row_length" in seen.text), f"exit codes {seen.codes}"
    assert seen.codes == [0] or "step-" not in seen.text, "found in mid-run"
    if seen.codes == [0]:
        assert re.search(r"^left out .*q\.jsonl, line \d+.* tokens", seen.text, re.M), "left out without a word"
    else:  # a run that has gone well advises nothing
        assert "another config" not in seen.after("as the message says"), "the advice is refused"


@judges("pass1-counts-format")
def _(seen: Seen) -> None:
    assert "(right)" not in seen.text and not re.search(r"pass@1 0?\.(?!0+\b)\d", seen.text), "form counts as solved"


@judges("resume-on-fewer-ranks")
def _(seen: Seen) -> None:
    one = seen.text.partition("two ranks")[0]
    assert "one rank: exit 0" in one or ("one rank: exit 2" in one and "--nproc 2" in one), one[-300:]
    assert "two ranks: exit 0" in seen.text, "two ranks do not go on"


@judges("resume-with-changed-data")
def _(seen: Seen) -> None:
    assert "stopped: exit 75" in seen.text and "same name: exit 2" in seen.text, f"exit codes {seen.codes}"


@judges("special-token-in-question")
def _(seen: Seen) -> None:
    assert re.search(r"^0 of [1-9]\d* prompts", seen.text, re.M), "prompts hold the end-of-text token"


@judges("steps-without-signal")
def _(seen: Seen) -> None:
    exits_with(0)(seen)
    ratios = [float(ratio) for ratio in re.findall(r"'ratio_max': ([\d.e+-]+)", seen.text)]
    assert all(ratio < 1.01 for ratio in ratios), f"the weights moved: ratio_max {ratios}"


@judges("traces-of-a-killed-climb")
def _(seen: Seen) -> None:
    assert "allow_third_party" not in seen.text, "one's own traces are marked as foreign"


@judges("watchdog-in-generation")
def _(seen: Seen) -> None:
    assert seen.codes == [0] or "--hang-seconds" in seen.text, f"exit codes {seen.codes}"


for _name in ("10-byte-order-mark", "28-prompt-not-utf8"):
    JUDGES[_name] = exits_with(*((0, 0) if _name.startswith("10") else (2, 0)))
for _name in ("12-file-name-not-utf8", "25-config-path-with-an-equals-sign"):
    JUDGES[_name] = exits_with(0)
