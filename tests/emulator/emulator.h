// SPDX-License-Identifier: Apache-2.0
// Runs CUDA device code on the host, for tests: one fiber per thread, one block at a time, a seeded
// random schedule. README.md says what it finds. csrc/cuda/device.cuh includes it outside of nvcc.
#pragma once

#include "block.h"
#include "copies.h"
#include "cuda_names.h"
#include "fiber.h"
#include "launch.h"
#include "tiles.h"
#include "warp.h"
