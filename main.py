"""Permute, quantize and fine-tune a network, and pack it into one small file.

python main.py --config=configs/resnet18.py [--workdir=DIR]
python main.py --help
"""

from pqf_jax.__main__ import main

if __name__ == "__main__":
  main()
