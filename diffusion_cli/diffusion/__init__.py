"""The mathematics of diffusion: schedules, parameterizations, denoisers, objectives, guidance, likelihood."""
