//! libvirt's `ch` driver and Busway: what `docs/libvirt.md` tells people to do, done.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use busway_lab::{Host, Job, Lab, page};

use crate::assigned::{guest, zoo};
use crate::proof::{Proof, Tier, count};

pub(crate) const PROOFS: &[Proof] = &[Proof::rounds(
    "libvirt_drives_a_domain_with_a_host_device_and_a_tap",
    driven,
)];

const PAGE: &str = include_str!("../../../../docs/libvirt.md");
const SET_UP: &str = include_str!("../../setup/libvirt.sh");

/// How a command of the page begins.
const VIRSH: &str = "virsh -c ch:///system ";
/// The device that the page gives to the guest, as libvirt writes its address.
const ADDRESS: &str = "domain='0x0000' bus='0x01' slot='0x00' function='0x0'";
/// What the page's kernel is started with.
const CMDLINE: &str = "console=ttyS0 root=/dev/vda1";
const LIMIT: Duration = Duration::from_secs(120);

/// The guest counts its boots on the drive that it was given, reaches the host by its NIC, and says back what it hears
/// on its console.
const SCRIPT: &str = "\
    boots=$(head -c 8 /dev/nvme0n1 | tr -dc 0-9)\n\
    boots=$((${boots:-0} + 1))\n\
    echo \"$boots.\" | dd of=/dev/nvme0n1 bs=4096 conv=sync,fsync 2>/dev/null\n\
    value drive \"$(cat /sys/class/nvme/nvme0/serial)\"\n\
    value disk \"$(head -c 4 /dev/vda)\"\n\
    value boots \"$boots\"\n\
    ip link set eth0 up && ip address add 192.168.77.2/24 dev eth0\n\
    { until ping -c 1 -W 1 192.168.77.1 >/dev/null; do sleep 0.1; done; value reached yes; } &\n\
    while read -r word; do value heard \"$word\"; done\n";

fn driven(lab: &mut Lab, tier: Tier) -> Result<()> {
    let words = |text: &str| {
        text.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let meson = words(page::block(PAGE, "meson")?);
    let built = SET_UP
        .split_once("libvirt_options=(")
        .and_then(|(_, rest)| rest.split_once(')'));
    let built = built.context("the set-up has options")?.0;
    ensure!(
        meson[3..] == words(built),
        "the page's options are not those that the lab's libvirt is built with"
    );
    let host = lab.host(&zoo())?;
    let address = host.address("nv0")?;
    prepare(host, &address)?;
    let mut commands: Vec<&str> = page::blocks(PAGE, "sh")
        .iter()
        .flat_map(|block| block.lines())
        .collect();
    let first = commands
        .iter()
        .position(|command| command.contains(" define "));
    let each_round = commands.split_off(first.context("the page defines a domain")?);
    for command in commands {
        let said = run(host, command)?;
        if command.ends_with(" version") {
            ensure!(said.contains("CH 53.0.0"), "libvirt found: {said}");
        }
    }
    let rounds = tier.of(1, 20);
    for _ in 0..rounds {
        let mut domain = Domain {
            host,
            address: &address,
            console: None,
            boots: 0,
            run: 0,
        };
        host.run("dd if=/dev/zero of=/dev/nvme0n1 bs=4096 count=1 conv=fsync")?;
        let mut verbs = Vec::new();
        for command in &each_round {
            let said = run(host, command)?;
            let verb = command.strip_prefix(VIRSH).unwrap_or(command);
            let verb = verb.split(' ').next().unwrap_or_default();
            domain.follow(verb, &said).with_context(|| {
                let log = "cat /var/log/libvirt/ch/web.log; ps -ef | grep cloud-hyp".to_owned();
                format!("after `{command}`; the domain's log: {:?}", host.run(&log))
            })?;
            verbs.push(verb);
        }
        let all = [
            "define", "start", "list", "ip", "suspend", "resume", "reboot", "shutdown", "start",
            "destroy", "undefine",
        ];
        ensure!(verbs == all, "the page has other commands: {verbs:?}");
        host.run(&format!("! {VIRSH} list --all --name | grep ."))?;
    }
    count("rounds", rounds);
    Ok(())
}

/// Runs a command of the page.
fn run(host: &Host, command: &str) -> Result<String> {
    host.run(&format!("cd /root\n{command}"))
}

/// Puts libvirt into the host, and what the page's domain is made of where it says.
fn prepare(host: &Host, address: &str) -> Result<()> {
    let guest = guest()?.script(SCRIPT);
    let domain = page::block(PAGE, "xml")?;
    ensure!(
        domain.contains(ADDRESS) && domain.contains(CMDLINE),
        "the page's domain has changed"
    );
    let parts: Vec<&str> = address.split([':', '.']).collect();
    let [segment, bus, device, function] = parts[..] else {
        bail!("{address} is no address");
    };
    let ours =
        format!("domain='0x{segment}' bus='0x{bus}' slot='0x{device}' function='0x{function}'");
    let domain = domain
        .replace(ADDRESS, &ours)
        .replace(CMDLINE, guest.kernel_words());
    fs::write(host.share().join("web.xml"), domain)?;
    fs::write(host.share().join("segment"), guest.segment()?)?;
    let libvirt = host
        .parts()
        .libvirt
        .as_ref()
        .context("the set-up made no libvirt")?;
    let libvirt = libvirt
        .file_name()
        .context("its folder has a name")?
        .to_string_lossy();
    host.run(&format!(
        "tar -x -f /cache/{libvirt}/libvirt.tar -C / --no-same-owner\n\
         # The latter is the system's to make when it boots, for whoever locks a terminal.\n\
         mkdir -p /var/lib/libvirt/boot /var/lib/libvirt/images /run/lock\n\
         cp /boot/vmlinux /var/lib/libvirt/boot/vmlinuz\n\
         cat /boot/guest.img /lab/segment >/var/lib/libvirt/boot/initrd.img\n\
         printf disk >/var/lib/libvirt/images/web.raw\n\
         truncate -s 1M /var/lib/libvirt/images/web.raw\n\
         mv /lab/web.xml /root/"
    ))
    .map(drop)
}

/// The page's domain, and what has become of it.
struct Domain<'a> {
    host: &'a Host,
    address: &'a str,
    /// Whoever is at its console.
    console: Option<Job>,
    boots: u32,
    /// The process that runs it.
    run: u32,
}

impl Domain<'_> {
    /// Sees that what was told has happened.
    fn follow(&mut self, verb: &str, said: &str) -> Result<()> {
        match verb {
            "start" => {
                self.is("running")?;
                self.has("vfio-pci")?;
                self.run = self
                    .host
                    .run("cat /run/libvirt/ch/web.pid")?
                    .trim()
                    .parse()?;
                self.open_console()?;
                self.booted()
            }
            "list" => {
                ensure!(
                    said.contains("web") && said.contains("running"),
                    "it lists {said}"
                );
                Ok(())
            }
            "ip" => self
                .says("@@value reached yes")
                .and_then(|()| self.answers("one")),
            "suspend" => {
                self.is("paused")?;
                self.type_in("two")
            }
            "resume" => {
                self.is("running")?;
                self.says("@@value heard two")
            }
            "reboot" => {
                self.booted()?;
                self.is("running")?;
                self.answers("three")
            }
            "shutdown" | "destroy" => self.ended(),
            "define" | "undefine" => Ok(()),
            other => bail!("nobody knows what comes of {other}"),
        }
    }

    fn is(&self, state: &str) -> Result<()> {
        let found = self.host.run(&format!("{VIRSH} domstate web"))?;
        ensure!(
            found.trim() == state,
            "it is {}, and was to be {state}",
            found.trim()
        );
        Ok(())
    }

    /// The device has that driver on the host.
    fn has(&self, driver: &str) -> Result<()> {
        let found = self.host.driver(self.address)?;
        ensure!(
            found.as_deref() == Some(driver),
            "{found:?} has the device, not {driver}"
        );
        Ok(())
    }

    /// Sits down at the console by the page's command, which wants a terminal.
    fn open_console(&mut self) -> Result<()> {
        let command = page::block(PAGE, "console")?;
        let job = self.host.spawn(&format!(
            "rm -f /run/typed; mkfifo /run/typed; exec 9<>/run/typed\n\
             exec socat - 'EXEC:\"{command}\",pty,setsid,ctty,rawer' <&9"
        ))?;
        job.wait_line(LIMIT, |line| line.contains("Connected to domain 'web'"))?;
        self.console = Some(job);
        Ok(())
    }

    fn says(&self, words: &str) -> Result<()> {
        let console = self.console.as_ref().context("nobody is at the console")?;
        console
            .wait_line(LIMIT, |line| line.contains(words))
            .map(drop)
    }

    fn type_in(&self, word: &str) -> Result<()> {
        self.host.run(&format!("echo {word} >/run/typed")).map(drop)
    }

    /// The guest hears what is typed.
    fn answers(&self, word: &str) -> Result<()> {
        self.type_in(word)?;
        self.says(&format!("@@value heard {word}"))
    }

    /// The guest has booted once more, with the drive and the disk.
    fn booted(&mut self) -> Result<()> {
        self.boots += 1;
        self.says(&format!("@@value boots {}", self.boots))?;
        self.says("@@value drive NV0")?;
        self.says("@@value disk disk")
    }

    /// Neither the process nor its tap is there any more, and the host's own driver has the device, as the guest left it.
    fn ended(&mut self) -> Result<()> {
        self.host.run(&format!(
            "timeout 60 tail --pid {} -f /dev/null\n\
             timeout 60 sh -c 'until [ \"$({VIRSH} domstate web)\" = \"shut off\" ]; do sleep 0.1; done'\n\
             udevadm settle\n! ip link show dev tap-web",
            self.run
        ))?;
        self.has("nvme")?;
        let boots = self.host.run("head -c 8 /dev/nvme0n1 | tr -dc 0-9")?;
        ensure!(boots == self.boots.to_string(), "the drive says {boots}");
        self.console = None;
        Ok(())
    }
}
