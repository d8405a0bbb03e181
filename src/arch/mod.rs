//! What one processor architecture alone has: its address map and boot protocols, its processors, chips and
//! board.
//!
//! The rest of Busway says `crate::arch::…`, and so has the architecture that it is built for. Another one is
//! another folder here, with modules of these names.

#[cfg(not(target_arch = "x86_64"))]
compile_error!("Busway has no part for this processor architecture, only for x86_64");

#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::*;
