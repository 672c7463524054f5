/* What the driver and the machine below it (pretended_gpu.c) ask of each other. */
#pragma once
#include "pretended_gpu.h"
#include <stddef.h>

void trouble(const char *format, ...);
int is_given(const char *address, size_t bytes);
void run_grid(Program *program, size_t bytes, uint32_t shared_bytes, const unsigned grid[3], const unsigned block[3],
              const uint64_t *parameters, const char *kernel);
