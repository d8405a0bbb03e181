//! A PC with x86_64 processors: what Linux and firmware expect to find, as `docs/design.md` draws it.

pub mod acpi;
pub mod board;
pub mod boot;
pub(crate) mod chips;
mod cpuid;
pub mod debug_port;
mod frequency;
pub mod gsi;
pub mod layout;
pub mod msi;
mod msr;
pub mod power;
pub mod q35;
pub mod rtc;
pub(crate) mod system_calls;
mod vcpu;

pub use cpuid::CpuFeatures;
pub use vcpu::CpuModel;
pub(crate) use vcpu::{Vcpu, VcpuMaker};
