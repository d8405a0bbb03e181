//! `scripts/lab`: the emulated host by hand.

mod bench;
mod demo;
mod figures;
mod mapping;
mod plugging;
mod starting;
mod terminal;
mod times;
mod traffic;

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use busway_lab::{Device, Host, HostConfig, Iommu, Kernel, Parts, Profile, build_busway};
use clap::{Args, Parser, Subcommand, ValueEnum};
use terminal::Terminal;

/// The emulated host: VFIO, KVM and an IOMMU on any machine.
#[derive(Debug, Parser)]
#[command(name = "lab")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes what the lab stands on: a Debian root, kernels, initramfs images, the host's disk.
    Setup,
    /// Boots the emulated host and runs a command in it.
    Run {
        #[command(flatten)]
        host: HostArgs,
        /// The longest that it may take, in seconds.
        #[arg(long, default_value_t = 3600)]
        limit: u64,
        /// The command and its arguments, as bash reads them.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// A guest with an NVMe drive and a NIC, beside a virtio disk and NIC: `scripts/demo`.
    Demo(demo::DemoArgs),
    /// Busway and QEMU with the same devices and guest, in turns, side by side: `scripts/bench`.
    Bench(bench::BenchArgs),
    /// Where the time of the last `scripts/test` went: a table, and `target/times.json`.
    Times(times::TimesArgs),
    /// Boots the emulated host with a shell of its own on this terminal; the shell's end is the host's.
    Shell {
        #[command(flatten)]
        host: HostArgs,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum KernelArg {
    Stock,
    Iommufd,
    Backports,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum IommuArg {
    Intel,
    Amd,
    None,
}

/// What the host is made of.
#[derive(Debug, Args)]
struct HostArgs {
    /// The host's kernel: Debian's own, the same with iommufd, or the newest, which has dma-bufs of devices.
    #[arg(long, value_enum, default_value = "stock")]
    kernel: KernelArg,
    /// The host's IOMMU.
    #[arg(long, value_enum, default_value = "intel")]
    iommu: IommuArg,
    /// The host's processors.
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// The host's memory, in MiB.
    #[arg(long, default_value_t = 4096)]
    memory: u64,
    /// A device: nvme[:MIB], e1000e, igb, e1000, rtl8139, edu, ivshmem[:MIB], display[:MIB], doorbell, xhci, hda or rng;
    /// its id is dev0, dev1 and so on.
    #[arg(long)]
    device: Vec<String>,
    /// Do not build Busway and put it into the host.
    #[arg(long)]
    without_busway: bool,
}

impl HostArgs {
    fn config(&self) -> Result<HostConfig> {
        let kernel = match self.kernel {
            KernelArg::Stock => Kernel::Stock,
            KernelArg::Iommufd => Kernel::Iommufd,
            KernelArg::Backports => Kernel::Backports,
        };
        let iommu = match self.iommu {
            IommuArg::Intel => Iommu::Intel,
            IommuArg::Amd => Iommu::Amd,
            IommuArg::None => Iommu::None,
        };
        let mut config = HostConfig::new(kernel)
            .iommu(iommu)
            .cpus(self.cpus)
            .memory_mib(self.memory);
        for (number, text) in self.device.iter().enumerate() {
            let device =
                Device::parse(&format!("dev{number}"), text).map_err(anyhow::Error::msg)?;
            config = config.device(device);
        }
        Ok(config)
    }

    fn boot(&self, boot: fn(HostConfig) -> Result<Host>) -> Result<Host> {
        let config = self.config()?;
        if self.without_busway {
            return boot(config);
        }
        let busway = build_busway(Profile::Lab)?;
        let host = boot(config)?;
        host.install(&busway)?;
        Ok(host)
    }
}

/// The exit status when it is the lab that failed, and not the command in it.
const LAB_FAILED: u8 = 125;

fn main() -> ExitCode {
    execute(Cli::parse().command).unwrap_or_else(|error| {
        eprintln!("lab: error: {error:#}");
        ExitCode::from(LAB_FAILED)
    })
}

fn execute(command: Command) -> Result<ExitCode> {
    match command {
        Command::Setup => Parts::prepare().map(|_| ExitCode::SUCCESS),
        Command::Run {
            host,
            limit,
            command,
        } => run(&host, limit, &command.join(" ")),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Times(arguments) => times::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Shell { host } => shell(&host),
    }
}

fn run(host: &HostArgs, limit: u64, command: &str) -> Result<ExitCode> {
    let host = host.boot(Host::boot)?;
    let job = host.spawn(command)?;
    let status = job.follow(
        Duration::from_secs(limit),
        &mut io::stdout(),
        &mut io::stderr(),
    )?;
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)))
}

fn shell(host: &HostArgs) -> Result<ExitCode> {
    const DAY: Duration = Duration::from_secs(24 * 3600);
    const SHELL: &str = "stty -F /dev/ttyS0 sane; cd; TERM=vt100 exec setsid --wait --ctty \
                         bash -i <>/dev/ttyS0 >&0 2>&1";
    // QEMU restores the terminal when it powers off, but not when it is killed.
    let terminal = Terminal::save();
    let host = host.boot(Host::boot_on_terminal)?;
    let status = host.spawn(SHELL)?.wait(DAY)?.status;
    host.power_off()?;
    drop(terminal);
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)))
}
