"""Steps that nothing can be learned from: counted, explained once per stretch, and at the end.

A step has no signal when the advantages of all its groups are 0 (`reward/no_signal_frac` is 1), or
when no response earned anything (`reward/mean` is 0: a penalty for length or KL alone would then be
trained on). One such step is no fault; many in a row are a run that costs machines and learns
nothing, and which would end as quietly as any other. Why is mostly seen from the outcomes: they are
averaged over the steps of the stretch.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

STEPS_WITHOUT_SIGNAL = "reward/steps_without_signal"

_SHARES = {  # metric -> what it is called here
    "response/truncated_frac": "truncated",
    "outcome/unparsable_frac": "no answer found",
    "outcome/wrong_frac": "wrong",
    "outcome/correct_frac": "correct",
    "outcome/timeout_frac": "grading timed out",
    "outcome/crash_frac": "grading crashed",
}
_MOST = 0.5  # a share from which on something is named as a reason


class SignalWatch:
    """Follows the metrics of one run's steps.

    watch = SignalWatch(warn_after=3, max_response_tokens=96, template="r1", answer_format="boxed")
    count = watch.observe(metrics)  # of every step; how many of the last ones had no signal
    if watch.is_due: print(watch.warning())
    """

    def __init__(
        self,
        *,
        warn_after: int,
        max_response_tokens: int,
        template: str,
        answer_format: str,
        records: Iterable[Mapping[str, float]] = (),
    ) -> None:
        """
        Args:
            warn_after: steps without signal in a row; 0: no warning.
            max_response_tokens, template, answer_format: of the run, named in reasons.
            records: of the steps that a resumed run has behind it, from `sinks.read_metrics`.
        """
        self._warn_after = warn_after
        self._max_response_tokens = max_response_tokens
        self._template, self._answer_format = template, answer_format
        self._num_steps = 0
        self._stretch: list[Mapping[str, float]] = []
        self._without_signal: list[Mapping[str, float]] = []
        for record in records:
            self.observe(record)

    def observe(self, metrics: Mapping[str, float]) -> int:
        """Count a step; the length of the stretch without signal that it ends, 0 if it has one.

        What is no training step (an evaluation before the first) changes nothing.
        """
        if "reward/no_signal_frac" in metrics:
            self._num_steps += 1
            if metrics["reward/no_signal_frac"] == 1 or metrics["reward/mean"] == 0:
                self._stretch.append(metrics)
                self._without_signal.append(metrics)
            else:
                self._stretch = []
        return len(self._stretch)

    @property
    def is_due(self) -> bool:
        """Whether to warn now: once per stretch, when it has become long."""
        return self._warn_after > 0 and len(self._stretch) == self._warn_after

    def warning(self) -> str:
        """What has happened in the last steps, and the likely reasons."""
        steps = len(self._stretch)
        last = "the last step" if steps == 1 else f"the last {steps} steps"
        why = "no group of responses had a signal"
        if any(step["reward/no_signal_frac"] < 1 for step in self._stretch):
            why = "no response earned anything, only penalties were trained on"
        what = f"warning: nothing could be learned in {last}: {why}"
        return "\n  ".join([what, *self._explanation(self._stretch)])

    def summary(self) -> str:
        """For the end of the run; "" where every step had a signal."""
        without = len(self._without_signal)
        if without == 0:
            return ""
        what = f"no signal in {without:,} of {self._num_steps:,} steps"
        if without < self._num_steps:
            return what
        what = f"warning: {what}: this run has learned nothing from its rewards"
        return "\n  ".join([what, *self._explanation(self._without_signal)])

    def _explanation(self, steps: Sequence[Mapping[str, float]]) -> list[str]:
        shares = {}
        for metric, name in _SHARES.items():
            shares[name] = fmean(step[metric] for step in steps)
        shown = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share > 0)
        return [f"responses: {shown}", *(f"likely: {reason}" for reason in self._reasons(shares))]

    def _reasons(self, shares: Mapping[str, float]) -> list[str]:
        reasons = []
        if shares["truncated"] >= _MOST:
            reasons.append(
                f"rollout.max_response_tokens={self._max_response_tokens} is too short, or the "
                f"model never ends its response; what is cut off earns nothing"
            )
        if shares["no answer found"] >= _MOST:
            reasons.append(
                f"the model does not put its answer where reward.answer_format="
                f"{self._answer_format!r} looks for it; does data.template={self._template!r} fit "
                f"this model?"
            )
        if shares["wrong"] >= _MOST:
            reasons.append(
                "the problems are too hard for this model, or data.answer_key names no answers"
            )
        if shares["correct"] >= _MOST and shares["truncated"] < _MOST:
            reasons.append("the problems are too easy for this model")
        if shares["grading timed out"] + shares["grading crashed"] >= _MOST:
            reasons.append(
                "the verifier's workers fail: reward.timeout_s and reward.memory_limit_mib"
            )
        if not reasons:
            reasons.append(
                "all responses to a question are alike: rollout.temperature is low, "
                "rollout.group_size small"
            )
        return reasons
