"""What answers cost, beside what they are worth: the numbers that stand beside accuracy in the results.

costs = Costs(retain_ratio=0.2)
costs.add(seconds=0.31, rows=1, shown=[Shown(frames=32, merged_frames=25, tokens=6272, kept=1254)])
costs.means()   -> {"ttft_ms": 310.0, "video_frames": 32.0, "stage1_retention": 0.78, ...}
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shown:
    """The videos of one question: frames and tokens before, and after compression."""

    frames: int
    merged_frames: int
    tokens: int
    kept: int
    encoded: float | None = None
    """Frames' worth of patches that the encoder computed, where it reuses those that did not change."""


@dataclass
class Costs:
    """Sums over the questions that were asked since they began."""

    retain_ratio: float | None
    _seconds: list[float] = field(default_factory=list)
    _of_videos: list[float] = field(default_factory=list)
    _encoding: float = 0.0
    _shown: list[Shown] = field(default_factory=list)

    def take_in(self, others: "Costs") -> None:
        """Add what others counted."""
        self._seconds += others._seconds
        self._of_videos += others._of_videos
        self._encoding += others._encoding
        self._shown += others._shown

    def add(self, seconds: float, rows: int, shown: Sequence[Shown]) -> None:
        """One call: ``seconds`` to the first token of all its ``rows``, and the videos of those that have any."""
        self._seconds += [seconds] * rows
        self._of_videos += [seconds] * len(shown)
        self._encoding += seconds if shown else 0.0
        self._shown += shown

    def means(self) -> dict[str, float]:
        """By name, means over questions; only what there was anything to count of.

        ``ttft_ms``: time to the first token, from inputs on the device to the first token of every row of the call, so
        with a batch that of the whole batch; vision encoder and prompt are in it, reading the video and compilation are
        not. Over the questions with a video, where there are any.
        ``video_frames``: frames of the videos of a question, temporal patches where a model has those;
        ``frames_per_second``: frames of all videos over the time to the first token of all calls that had any.
        ``stage1_retention``: share of all frames that is left when frames have merged, in (0, 1].
        ``patches_computed``: share of all patches that was computed where unchanged ones are reused.
        ``video_tokens``, ``video_tokens_kept``: tokens of the videos of a question, without separators such as the
        newline, as the full model has them and as the language model got them.
        ``retain_ratio``: the one asked for, 1.0 for the full model.
        """
        means = {"retain_ratio": 1.0 if self.retain_ratio is None else self.retain_ratio}
        seconds = self._of_videos or self._seconds
        if seconds:
            means["ttft_ms"] = 1000 * sum(seconds) / len(seconds)
        if not (count := len(self._shown)):
            return means
        frames = sum(shown.frames for shown in self._shown)
        if any(shown.encoded is not None for shown in self._shown):
            encoded = (shown.frames if shown.encoded is None else shown.encoded for shown in self._shown)
            means["patches_computed"] = sum(encoded) / frames
        return means | {
            "video_frames": frames / count,
            "stage1_retention": sum(shown.merged_frames for shown in self._shown) / frames,
            "video_tokens": sum(shown.tokens for shown in self._shown) / count,
            "video_tokens_kept": sum(shown.kept for shown in self._shown) / count,
            "frames_per_second": frames / self._encoding,
        }


@dataclass
class Spent:
    """Seconds and new tokens of the calls of one round, for lmms-eval's own ``avg_speed``."""

    seconds: float = 0.0
    tokens: int = 0

    def add(self, seconds: float, tokens: int) -> None:
        """One call."""
        self.seconds += seconds
        self.tokens += tokens
