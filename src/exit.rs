//! What the process's exit status says.

/// It failed while running.
pub const RUNTIME: u8 = 1;
/// The command line or the configuration is wrong.
pub const USAGE: u8 = 2;
/// This host cannot do it.
pub const HOST: u8 = 3;
