"""The lingbot_jax package. Lower bounds are the versions the test suite was run with."""

from setuptools import find_packages, setup

CORE = [
    "absl-py>=2.5",
    "einops>=0.8.2",
    "etils[epath]>=1.15",
    "flax>=0.12.8,<0.13",
    "jax>=0.10.2,<0.13",
    "jaxtyping>=0.3.11",
    "ml-collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pillow>=12",
    "psutil>=7.2",
    "pyyaml>=6.0.3",
    "pydantic>=2.12,<3",
    "rich>=15",
    "safetensors>=0.8",
    "scipy>=1.16",
    "tensorboardX>=2.6.5",
    "zstandard>=0.25",  # JAX compresses compiled programs with it where it is installed
]
DATA = [
    "apache-beam>=2.77,<3",
    "array-record>=0.8.3",
    "av>=18",
    "grain>=0.2.18,<0.3",
    "opencv-python-headless>=4.13",
    "panda3d>=1.10.16,<1.11",
    "poselib>=2.0.5,<3",
    "scenedetect-headless>=0.7.2,<0.8",
    "vizdoom>=1.3.2,<1.4",  # engine licence: non-commercial, see README
]
SERVE = [
    "av>=18",
    "opencv-python-headless>=4.13",
    "prometheus-client>=0.26",
    "starlette>=1.1,<2",
    "uvicorn>=0.54,<1",
    "websockets>=17,<18",
]
BROWSER = ["kubernetes-validate>=1.37", "playwright>=1.65"]  # with Chromium and nginx of the system
EVAL = ["matplotlib>=3.10"]
CONVERT = ["torch>=2.13", "diffusers>=0.38", "transformers>=5", "peft>=0.21"]
TEXT = ["ftfy>=6.3", "tokenizers>=0.22"]
GCS = ["gcsfs>=2026.3"]  # runs, data and bundles in gs://
WANDB = ["wandb>=0.31,<1"]
TEST = [
    *GCS,
    "beartype>=0.22",
    "gcp-storage-emulator>=2026.7",
    "huggingface-hub>=2.4,<3",
    "hypothesis>=6.150",
    "pytest>=9",
    "pytest-xdist>=3.8",
]
DEV = ["ruff>=0.15,<0.18"]

setup(
    name="lingbot_jax",
    version="0.1.0.dev0",
    description="Train and serve interactive world models in JAX, on TPU pods and on a laptop",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["lingbot_jax*", "kernels_pallas*", "experiments*"]),
    package_data={"lingbot_jax.serve": ["web/*"]},
    install_requires=CORE + TEXT,
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],  # the libtpu that this JAX was made for
        "data": DATA,
        "serve": SERVE,
        "browser": BROWSER,
        "eval": EVAL,
        "gcs": GCS,
        "wandb": WANDB,
        "convert": CONVERT,
        "test": TEST,
        "dev": DEV,
        "lock": ["uv>=0.13,<1"],  # make lock
    },
)
