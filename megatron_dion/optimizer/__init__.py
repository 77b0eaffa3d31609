"""The join of Dion with torch and Megatron-core; import what needs Megatron by its module."""
