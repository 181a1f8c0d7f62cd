//! An agent that holds a view, and the controller that sent it.

use switchtower_node_agent_testing::controller::{FakeController, FakeStream};
use switchtower_node_agent_testing::fleet::Fleet;
use switchtower_proto::v1::Settings;

use super::process::{Agent, programmed};

/// A running agent, its controller with the open stream, and a directory with the agent's files.
pub struct Scene {
    pub directory: tempfile::TempDir,
    pub fleet: Fleet,
    pub controller: FakeController,
    pub agent: Agent,
    pub stream: FakeStream,
    /// Revision of the last settings.
    pub revision: u64,
}

impl Scene {
    /// Starts an agent and waits until it holds the view.
    pub async fn of(fleet: Fleet) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (controller, agent, stream) = programmed(&fleet, directory.path()).await;
        Scene { directory, fleet, controller, agent, stream, revision: 1 }
    }

    /// Sends settings and waits until the kernel holds them.
    pub async fn set(&mut self, settings: Settings) {
        self.revision += 1;
        let settings = Settings { profile: "default".into(), revision: self.revision, ..settings };
        self.stream.update(self.fleet.replace_settings(settings)).await;
        let ack = self.stream.ack().await;
        assert_eq!((ack.generation, ack.deviations), (self.fleet.generation, None));
    }
}
