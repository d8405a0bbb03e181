//! The kernel's interface, driven by guests of a few instructions. Needs `/dev/kvm`; where there is
//! none, each test says so and passes.

mod again;
mod attentive;
mod bare;
mod bios;
mod clients;
mod consoles;
mod cores;
mod curl;
mod divided;
mod exits;
mod generated;
mod guest;
mod hostile;
mod interrupts;
mod jail;
mod landlock;
mod lines;
mod memory;
mod notified;
mod opened;
mod ordinary;
mod processors;
mod resizing;
mod served;
mod tpm;
mod traced;
mod unflushed;
mod walls;
mod want;
mod whole;
mod writer;
