// Which instruction set the CPU implementations run on.
#pragma once

namespace unique_attn {

// The one in use: the best that the machine has, or a lower one if UNIQUE_ATTN_ISA (read once) names it.
const char* cpu_isa();

// All compiled ones, from the lowest, separated by commas.
const char* cpu_isas();

}  // namespace unique_attn
