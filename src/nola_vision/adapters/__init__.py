"""NOLA, LoRA, PRANC, HashedNet and the stack that holds them beside a backbone. torch only: no Lightning, no timm."""
