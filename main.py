"""Permute, quantize and fine-tune a network, and pack it into one small file.

python main.py --config=configs/resnet18.py [--workdir=DIR]
"""

from pqf_jax import cli

if __name__ == "__main__":
  cli.main()
