"""GPT pretraining with megatron.training: every Megatron flag, plus `--optimizer dion`.

torchrun --nproc-per-node N pretrain_gpt.py <Megatron flags>
"""

from megatron_dion.megatron import main

if __name__ == "__main__":
    main()
