//! Devices that lie and guests that do as they please: each function here takes any bytes as the story
//! of both, plays it, and panics where something does not hold that always has to.
//!
//! The property tests beside this file play random stories, `tests/fuzz` those that reach new code.

mod bars;
mod configuration;
mod msix;
#[cfg(test)]
mod tests;
mod world;

pub use bars::bars;
pub use configuration::configuration;
pub use msix::msix;
