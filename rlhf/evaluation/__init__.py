"""What a reward model or a policy is worth, as figures with 95 % intervals."""
