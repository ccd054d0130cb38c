//! The commands and their options.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Runs pods of containers: the daemon that a kubelet speaks to, and its command line.
#[derive(Debug, Parser)]
#[command(name = "longshore", version, about, disable_help_subcommand = true)]
pub struct Cli {
    /// The daemon's socket [default: /run/longshore/longshore.sock]
    #[arg(long, global = true, env = "LONGSHORE_SOCKET", value_name = "PATH", hide_env_values = true)]
    pub socket: Option<PathBuf>,
    /// Where a shim was told to send its events
    #[arg(long, global = true, hide = true, value_name = "PATH")]
    pub address: Option<PathBuf>,
    /// How results are printed
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    pub output: Format,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    Table,
    /// For programs: CRI's messages as proto3 JSON
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon
    Serve(ServeArgs),
    /// Run a command in a new container, in a pod of its own or in an existing one
    Run(Box<RunArgs>),
    /// List pods
    Pods(ListArgs),
    /// List containers
    Ps(PsArgs),
    /// Run a command in a running container and print what it wrote
    Exec(ExecArgs),
    /// Print a container's output
    Logs(LogsArgs),
    /// Stop pods or containers
    Stop(StopArgs),
    /// Remove pods or containers
    Rm(RemoveArgs),
    /// List images
    Images(ListArgs),
    /// Pull an image from a registry
    Pull(PullArgs),
    /// Import an OCI or docker archive, or an OCI layout folder
    Import(ImportArgs),
    /// Remove images
    Rmi(RmiArgs),
    /// Print all that is known of pods, containers or images, as JSON
    Inspect(InspectArgs),
    /// Draw what each step of a pod's start took
    Timeline(TimelineArgs),
    /// Send a shim's event to the daemon; shims of containerd's older kind execute it
    #[command(hide = true)]
    Publish(PublishArgs),
    /// Look for what keeps pods from running on this node, with a remedy for each
    Doctor(DoctorArgs),
    /// Print every configuration key with its default
    Config,
    /// Print the points at which a daemon under test can be told to die
    #[command(hide = true)]
    FaultPoints,
    /// Print the versions of client and daemon
    Version,
}

/// Options of `publish`; the event, an encoded `google.protobuf.Any`, comes on stdin.
#[derive(Debug, Args)]
pub struct PublishArgs {
    /// The global `--address`.
    #[arg(skip)]
    pub address: Option<PathBuf>,
    /// What it is about, such as /tasks/exit
    #[arg(long)]
    pub topic: String,
    /// The namespace of the container
    #[arg(long, default_value = "k8s.io")]
    pub namespace: String,
}

/// Options of the daemon.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The global `--socket`, where it was given.
    #[arg(skip)]
    pub socket: Option<PathBuf>,
    /// The configuration file [default: /etc/longshore/config.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where images, containers and the database are kept [default: /var/lib/longshore]
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// What ends with the node's uptime: bundles, namespaces, sockets [default: /run/longshore]
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// A level (error, warn, info, debug, trace) or directives such as info,h2=warn
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
}

/// Options of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// The daemon's configuration file [default: /etc/longshore/config.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The daemon's root directory, where it is not the configured one
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// The daemon's state directory, where it is not the configured one
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Have the daemon remove leftovers now, and not only every five minutes
    #[arg(long)]
    pub fix: bool,
}

/// How a container's pod is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Network {
    /// A network namespace of the pod's own
    Pod,
    /// The node's network
    Host,
}

/// When an image is pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pull {
    /// Always, even if it is here
    Always,
    /// If it isn't here
    Missing,
    /// Never
    Never,
}

/// Options of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Remove the container (and the pod made for it) when it has ended
    #[arg(long)]
    pub rm: bool,
    /// Don't wait for it: print its id and return
    #[arg(short, long, conflicts_with_all = ["interactive", "rm"])]
    pub detach: bool,
    /// Pass on standard input
    #[arg(short, long)]
    pub interactive: bool,
    /// An environment variable; without =VALUE it is taken from our own environment
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// A folder or file of the node; OPTIONS: ro, rw, rro, rprivate, rslave, rshared
    #[arg(short, long, value_name = "HOST:CONTAINER[:OPTIONS]")]
    pub volume: Vec<String>,
    /// The container's name, and that of the pod made for it
    #[arg(long)]
    pub name: Option<String>,
    /// Run in this pod; new:NAME makes it first
    #[arg(long, value_name = "[new:]POD", conflicts_with_all = ["network", "hostname", "runtime_handler"])]
    pub pod: Option<String>,
    /// The network of the pod made for it
    #[arg(long, value_enum, default_value_t = Network::Pod)]
    pub network: Network,
    /// A port of the node that leads to the pod that is made; PROTO: tcp, udp, sctp
    #[arg(short, long, value_name = "[IP:]PORT:PODPORT[/PROTO]")]
    pub publish: Vec<String>,
    /// The pod's host name [default: its name]
    #[arg(long)]
    pub hostname: Option<String>,
    /// Replace the image's entrypoint
    #[arg(long, value_name = "COMMAND")]
    pub entrypoint: Option<String>,
    /// The working directory in the container
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// The user: a name, or a number with an optional group number
    #[arg(short, long, value_name = "USER[:GID]")]
    pub user: Option<String>,
    /// A label of the container
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub label: Vec<String>,
    /// The most memory it may use, in bytes or with k, m, g
    #[arg(short, long, value_name = "BYTES")]
    pub memory: Option<String>,
    /// How many processors' time it may use, e.g. 0.5
    #[arg(long, value_name = "NUMBER")]
    pub cpus: Option<f64>,
    /// Give it all capabilities and devices of the node
    #[arg(long)]
    pub privileged: bool,
    /// Mount its root file system read-only
    #[arg(long)]
    pub read_only: bool,
    /// The runtime handler of the pod made for it
    #[arg(long, value_name = "HANDLER", default_value = "")]
    pub runtime_handler: String,
    /// The cgroup below which the pod's is made
    #[arg(long, value_name = "PATH", default_value = "")]
    pub cgroup_parent: String,
    /// When to pull the image
    #[arg(long, value_enum, default_value_t = Pull::Missing)]
    pub pull: Pull,
    /// How many seconds it is given to end when we are interrupted
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub stop_timeout: i64,
    /// The image: a reference, or an image's id
    pub image: String,
    /// The command and its arguments [default: the image's]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// Options of lists.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Print ids only
    #[arg(short, long)]
    pub quiet: bool,
    /// Print ids in full
    #[arg(long)]
    pub no_trunc: bool,
}

/// Options of `ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Also those that don't run
    #[arg(short, long)]
    pub all: bool,
    /// Only those of this pod
    #[arg(short, long)]
    pub pod: Option<String>,
    /// The rest
    #[command(flatten)]
    pub list: ListArgs,
}

/// Options of `exec`.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Kill the command after so many seconds [default: never]
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub timeout: i64,
    /// The container: its name, id or the beginning of its id
    pub container: String,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    pub command: Vec<String>,
}

/// Options of `logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on until the container ends
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "LINES")]
    pub tail: Option<usize>,
    /// Print the time of each line
    #[arg(short, long)]
    pub timestamps: bool,
    /// The container: its name, id or the beginning of its id
    pub container: String,
}

/// Options of `stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// How many seconds containers are given to end before they are killed
    #[arg(short = 't', long = "time", value_name = "SECONDS", default_value_t = 10)]
    pub timeout: i64,
    /// Pods or containers: names, ids or the beginning of ids
    #[arg(required = true, value_name = "POD|CONTAINER")]
    pub targets: Vec<String>,
}

/// Options of `rm`.
#[derive(Debug, Args)]
pub struct RemoveArgs {
    /// Also what still runs
    #[arg(short, long)]
    pub force: bool,
    /// Pods or containers: names, ids or the beginning of ids
    #[arg(required = true, value_name = "POD|CONTAINER")]
    pub targets: Vec<String>,
}

/// Options of `pull`.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// The image: a name with an optional tag or digest
    pub image: String,
}

/// Options of `import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The name of an image that carries none in the archive
    #[arg(long, value_name = "REFERENCE", default_value = "")]
    pub name: String,
    /// A tar file or a folder that the daemon can read
    pub file: PathBuf,
}

/// Options of `rmi`.
#[derive(Debug, Args)]
pub struct RmiArgs {
    /// Names, ids or the beginning of ids
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
}

/// Options of `inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Pods, containers or images: names, ids or the beginning of ids
    #[arg(required = true, value_name = "POD|CONTAINER|IMAGE")]
    pub targets: Vec<String>,
}

/// Options of `timeline`.
#[derive(Debug, Args)]
pub struct TimelineArgs {
    /// The pod: its name, id or the beginning of its id
    pub pod: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_follows_the_image_belongs_to_the_command() {
        let cli = Cli::parse_from(["longshore", "run", "--rm", "-e", "A=1", "busybox", "ls", "-o", "json", "--rm"]);
        let Command::Run(run) = cli.command else { panic!("{:?}", cli.command) };
        assert_eq!((run.image.as_str(), run.env.len(), run.rm), ("busybox", 1, true));
        assert_eq!(run.command, ["ls", "-o", "json", "--rm"]);
        assert_eq!(cli.output, Format::Table);
    }

    #[test]
    fn global_options_may_follow_the_command() {
        let cli = Cli::parse_from(["longshore", "ps", "-o", "json", "--socket", "/x"]);
        assert_eq!((cli.output, cli.socket), (Format::Json, Some(PathBuf::from("/x"))));
        let cli = Cli::parse_from(["longshore", "serve", "--socket", "/x", "--root", "/r"]);
        assert!(matches!(cli.command, Command::Serve(ServeArgs { root: Some(_), .. })));
    }
}
