//! The walls that the flags and the file ask for.

use clap::builder::{PossibleValuesParser, TypedValueParser};

use super::{NoConfig, RunArgs, extend};
use crate::cli::failure::Failure;
use crate::cli::schema;
use crate::config::{Choice, InvalidConfig, VmConfig};
use crate::control::SocketAddress;
use crate::exit::HOST;
use crate::machine::{self, ProcessBounds};
use crate::sandbox::landlock::Rules;
use crate::sandbox::{self, Apart, Bounds, User};

impl RunArgs {
    /// Puts the walls up that the flags ask for, before any thread is there. `vm`: what there is at once, and where it is
    /// controlled.
    pub(in crate::cli) fn confine(
        &self,
        vm: Option<&(VmConfig, Option<SocketAddress>)>,
    ) -> Result<(), Failure> {
        let named = vm.map(|(config, socket)| {
            let rules = Rules::of(config, socket.is_some())
                .with_made(socket.as_ref().and_then(SocketAddress::path))
                .with_made(self.report.as_deref());
            (config, rules)
        });
        let mut apart = Apart::default();
        if let Some((config, rules)) = &named {
            if config.landlock != Choice::Off || config.jail {
                machine::look_for_holders(config);
            }
            let user = config.user.as_deref().map(User::named);
            apart.user = user.transpose().map_err(Failure::usage)?;
            apart.made = rules.made().to_vec();
            if config.jail {
                machine::keep_host_network(config).map_err(|error| Failure::new(HOST, error))?;
                apart.jail = Some(rules.clone());
            }
        }
        let bounds = match &named {
            Some((config, rules)) if config.landlock != Choice::Off => {
                Bounds::Files(config.landlock, rules)
            }
            _ if self.landlock == Some(Choice::Off) => Bounds::None,
            _ => Bounds::Threads,
        };
        sandbox::confine(self.seccomp, bounds, &apart).map_err(|error| Failure::new(HOST, error))
    }

    /// What the flags say of Landlock to a process that has VMs of which they say nothing.
    pub(in crate::cli) fn process_bounds(&self) -> Result<ProcessBounds, NoConfig> {
        let mut rules = Vec::new();
        extend(&schema::LANDLOCK_RULES, &mut rules, &self.landlock_rules)?;
        let landlock = self.landlock.unwrap_or(Choice::Off);
        if landlock == Choice::Off && !rules.is_empty() && !self.describes_vm() {
            return Err(InvalidConfig::LandlockRules.into());
        }
        Ok(ProcessBounds { landlock, rules })
    }
}

/// The words of `--landlock`.
pub(super) fn landlock_parser() -> impl TypedValueParser<Value = Choice> {
    PossibleValuesParser::new(["true", "false", "auto"]).map(|word| match word.as_str() {
        "true" => Choice::On,
        "false" => Choice::Off,
        _ => Choice::Auto,
    })
}
