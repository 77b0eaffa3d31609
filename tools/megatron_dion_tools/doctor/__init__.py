"""The command `megatron-dion doctor`: is this machine, or are all ranks of a job, fit to train?"""
