"""Mathematics of diffusion: schedules, parameterizations, denoisers, objectives, guidance, likelihood."""
