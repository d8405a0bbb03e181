//! A PC with x86_64 processors: what Linux and firmware expect to find, as `docs/design.md` draws it.

pub mod boot;
pub mod debug_port;
pub mod layout;
pub mod power;
pub mod q35;
pub mod rtc;
