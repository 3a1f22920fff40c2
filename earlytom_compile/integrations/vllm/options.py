"""What ``--mm-processor-kwargs '{"earlytom": ...}'`` may say, of a server and of a request; needs no vLLM.

>>> of_server({"earlytom": {"retain_ratio": 0.1}})
{'retain_ratio': 0.1}
>>> of_request({"retain_ratio": 0.1}, {"earlytom": {"retain_ratio": 0.25}})
{'retain_ratio': 0.25}
>>> of_request({"retain_ratio": 0.1}, {"earlytom": False}) is None     # this one uncompressed
True
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...config import EarlyTomConfig
from ...errors import EarlyTomConfigError
from ...families.base import Family

KEY = "earlytom"
"""Among vLLM's ``mm_processor_kwargs``, which are part of the hash by which it caches what it made of a video."""
FIELD = "earlytom_options"
"""Of a video beside its pixels, on its way to the workers: its options, as :func:`packed`."""
OF_REQUESTS = ("retain_ratio", "tau_seg", "alpha", "tau_merge", "tau_reuse", "encode_ratio")
"""What a request may choose otherwise than its server: numbers. All else is another graph, which is compiled while all
requests wait, and of which nobody knows yet whether it can be."""
_NO_EFFECT = {
    "strict": "a video is compressed or its request fails",
    "compile_llm": "vLLM compiles the language model itself",
}

Options = dict[str, Any]
"""As :meth:`EarlyTomConfig.from_options` takes them."""


def of_server(mm_processor_kwargs: Mapping[str, Any] | None) -> Options | None:
    """The options a server was started with; None where it leaves videos uncompressed.

    Raises :class:`EarlyTomConfigError` for what no server can do."""
    options = _options(_given(mm_processor_kwargs or {}))
    if options is not None:
        check(options)
    return options


def of_request(server: Options | None, mm_processor_kwargs: Mapping[str, Any]) -> Options | None:
    """Those of the server with a request's own over them; None where its videos are left uncompressed.

    Raises :class:`EarlyTomConfigError` for options that a request may not choose, or that its server could not follow.
    """
    given = _given(mm_processor_kwargs)
    if KEY not in mm_processor_kwargs:
        return server
    own = _options(given)
    if own is None:
        return None
    if server is None:
        raise EarlyTomConfigError(
            f"this request asks for {KEY}={mm_processor_kwargs[KEY]!r}, but the server was started without: its videos "
            "would be uncompressed. Start it with --mm-processor-kwargs '{\"earlytom\": {}}', or leave it out."
        )
    for name in own:
        if own[name] != server.get(name) and name not in OF_REQUESTS:
            # An option that does not exist at all says so; with "paper", those of merging have a meaning.
            check(own if "method" in own else {"variant": "paper", **own})
            raise EarlyTomConfigError(
                f"{name}={own[name]!r} in a request: its server decides that, since another graph would have to be "
                f"compiled while all requests wait. A request may choose {', '.join(OF_REQUESTS)}; give {name} to the "
                "server's --mm-processor-kwargs."
            )
    options = _sorted({**server, **own})
    check(options)
    return options


def _given(mm_processor_kwargs: Mapping[str, Any]) -> Any:
    """What stands under :data:`KEY`; raises :class:`EarlyTomConfigError` for it among those of transformers' parts."""
    for name, part in mm_processor_kwargs.items():
        if isinstance(part, Mapping) and name != KEY and KEY in part:
            raise EarlyTomConfigError(
                f"{KEY} inside {name} of mm_processor_kwargs would be left unread: it stands beside {name}, as in "
                '{"earlytom": {"retain_ratio": 0.1}}.'
            )
    return mm_processor_kwargs.get(KEY)


def _options(given: Any) -> Options | None:
    if given is None or given is False:
        return None
    if given is True:
        return {}
    if not isinstance(given, Mapping):
        raise EarlyTomConfigError(
            f"{KEY}={given!r} in mm_processor_kwargs: must be a mapping of options, such as "
            '{"retain_ratio": 0.1}, true for the defaults, or false.'
        )
    return _sorted(given)


def _sorted(options: Mapping[str, Any]) -> Options:
    """One order for all that say the same: vLLM's hash tells orders apart."""
    return dict(sorted(options.items(), key=lambda item: str(item[0])))


def check(options: Options) -> None:
    """Raise :class:`EarlyTomConfigError` for options with which a video's tokens would not be K, known from its shape,
    or that mean nothing here."""
    for name, instead in _NO_EFFECT.items():
        if name in options:
            raise EarlyTomConfigError(
                f"{name}={options[name]!r} under vLLM has no effect: {instead}. Leave {name} out."
            )
    config = EarlyTomConfig.from_options(options)
    if not config.keeps_exactly():
        raise EarlyTomConfigError(
            f"variant={config.variant!r} under vLLM: how many tokens it keeps depends on the content of the video, and "
            "vLLM plans a prompt from the shape alone. Choose variant='paper' or 'plus'."
        )
    if config.reduces_inside():
        option = f"method={config.method!r}" if config.inner_layer is None else f"inner_layer={config.inner_layer}"
        raise EarlyTomConfigError(
            f"{option} under vLLM: its language model keeps one length of prompt for all layers. Leave it out."
        )


def config_of(options: Options, family: Family, *, eager: bool) -> EarlyTomConfig:
    """The options as one object, with the defaults of the family. ``eager`` is vLLM's ``--enforce-eager``: nothing is
    compiled unless ``lowering`` says so."""
    given = {"lowering": "eager", **options} if eager else options
    # Placeholders are planned by now: rows of an uncompressed video would be cut off without a word.
    return EarlyTomConfig.from_options({**family.options(given), "strict": True})


def packed(options: Options | None) -> Tensor:
    """Options as a tensor, uint8 [bytes of their JSON], since that is what travels with a video to vLLM's workers."""
    text = json.dumps(options, sort_keys=True)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def unpacked(tensor: Tensor) -> Options | None:
    """The way back."""
    return json.loads(bytes(tensor.tolist()).decode())
