//! The command line.

pub mod device;
