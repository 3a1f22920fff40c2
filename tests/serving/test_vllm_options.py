"""What --mm-processor-kwargs may say; needs no vLLM."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.families.llava_onevision import LlavaOnevision
from earlytom_compile.families.qwen_vl import Qwen2_5_VL
from earlytom_compile.integrations.vllm.options import (
    OF_REQUESTS,
    config_of,
    of_request,
    of_server,
    packed,
    unpacked,
)

ratios = st.floats(0.01, 1.0)


class TestServer:
    @pytest.mark.parametrize("kwargs", [None, {}, {"fps": 2}, {"earlytom": None}, {"earlytom": False}])
    def test_is_off_unless_asked(self, kwargs):
        assert of_server(kwargs) is None

    @pytest.mark.parametrize("given", [{}, True])
    def test_takes_the_defaults(self, given):
        assert of_server({"earlytom": given, "fps": 2}) == {}

    @given(ratios)
    def test_takes_options(self, ratio):
        assert of_server({"earlytom": {"retain_ratio": ratio, "full_layers": [1, 2]}}) == {
            "retain_ratio": ratio,
            "full_layers": [1, 2],
        }
        merging = {"variant": "paper", "merge_layers": [1, 2]}
        assert of_server({"earlytom": merging}) == dict(sorted(merging.items()))

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ("0.1", "must be a mapping"),
            (0.1, "must be a mapping"),
            ({"retain": 0.1}, "did you mean 'retain_ratio'"),
            ({"retain_ratio": 1.5}, "must be in"),
            ({"merge_layers": [1, 2]}, '"plus", the default, which reuses patches.*variant="paper"'),
            ({"variant": "released"}, "depends on the content.*variant='paper' or 'plus'"),
            ({"inner_layer": 18}, "one length of prompt for all layers"),
            ({"method": "pyramiddrop"}, "one length of prompt for all layers"),
            ({"strict": False}, "compressed or its request fails"),
            ({"compile_llm": True}, "compiles the language model itself"),
        ],
    )
    def test_refuses(self, options, reason):
        with pytest.raises(EarlyTomConfigError, match=reason):
            of_server({"earlytom": options})


class TestRequest:
    @given(ratios, ratios)
    def test_has_its_own_numbers_over_the_servers(self, servers, own):
        server = {"retain_ratio": servers, "variant": "plus"}
        assert of_request(server, {}) == server
        assert of_request(server, {"earlytom": {}}) == server
        assert of_request(server, {"earlytom": {"retain_ratio": own}}) == {"retain_ratio": own, "variant": "plus"}
        assert server == {"retain_ratio": servers, "variant": "plus"}

    def test_that_say_the_same_have_one_order(self):
        """vLLM's hash tells orders apart."""
        server = of_server({"earlytom": {"variant": "paper", "tau_seg": 0.5, "retain_ratio": 0.1}})
        one = of_request(server, {"earlytom": {"tau_merge": 0.8, "alpha": 0.7}})
        other = of_request(server, {"earlytom": {"alpha": 0.7, "tau_merge": 0.8, "retain_ratio": 0.1}})
        assert list(one.items()) == list(other.items())
        assert list(of_request(server, {"earlytom": {}})) == list(server)

    @pytest.mark.parametrize("off", [False, None])
    def test_may_be_left_alone(self, off):
        assert of_request({"retain_ratio": 0.1}, {"earlytom": off}) is None
        assert of_request(None, {"earlytom": off}) is None

    def test_may_say_again_what_the_server_said(self):
        assert of_request({"variant": "plus"}, {"earlytom": {"variant": "plus"}}) == {"variant": "plus"}

    @pytest.mark.parametrize("own", [{}, True, {"retain_ratio": 0.1}])
    def test_is_refused_where_the_server_does_not_compress(self, own):
        with pytest.raises(EarlyTomConfigError, match="server was started without"):
            of_request(None, {"earlytom": own})

    @pytest.mark.parametrize(
        "own", [{"variant": "plus"}, {"merge_layers": [1]}, {"method": "visionzip"}, {"lowering": "whole"}]
    )
    def test_may_not_ask_for_another_graph(self, own):
        (name,) = own
        with pytest.raises(EarlyTomConfigError, match=f"{name}=.* in a request: its server decides.*retain_ratio"):
            of_request({"retain_ratio": 0.1}, {"earlytom": own})

    def test_numbers_are_options(self):
        assert set(OF_REQUESTS) <= set(config_of({}, LlavaOnevision(), eager=False).__dataclass_fields__)


class TestConfig:
    def test_is_strict(self):
        assert config_of({}, LlavaOnevision(), eager=False).strict

    def test_is_compiled_unless_vllm_is_not(self):
        assert config_of({}, LlavaOnevision(), eager=False).lowering == "staged"
        assert config_of({}, LlavaOnevision(), eager=True).lowering == "eager"
        assert config_of({"lowering": "whole"}, LlavaOnevision(), eager=True).lowering == "whole"

    def test_has_the_defaults_of_the_family(self):
        for options in ({}, {"variant": "plus"}):
            ours, qwens = (config_of(options, family(), eager=True) for family in (LlavaOnevision, Qwen2_5_VL))
            assert (ours.variant, ours.reuses()) == ("plus", True)
            assert (qwens.variant, qwens.reuses()) == ("plus", False)


@given(st.none() | st.dictionaries(st.sampled_from(OF_REQUESTS), ratios))
def test_options_travel_as_a_tensor(options):
    tensor = packed(options)
    assert tensor.dtype == torch.uint8 and tensor.dim() == 1
    assert unpacked(tensor.clone()) == options


@pytest.mark.parametrize("of", [lambda kwargs: of_server(kwargs), lambda kwargs: of_request({}, kwargs)])
def test_options_among_those_of_transformers_are_refused(of):
    with pytest.raises(EarlyTomConfigError, match="inside videos_kwargs .* would be left unread"):
        of({"videos_kwargs": {"earlytom": {"retain_ratio": 0.1}}})
