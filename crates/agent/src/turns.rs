//! Whose turn it is to use the processor for keys: fair between clusters, and
//! between the callers of one cluster.
//!
//! Clusters take turns, inside a cluster its callers do, and of one caller wraps
//! go first, then single unwraps, then batches, which take a turn for every few
//! DEKs. So who has few calls in flight waits for one turn of each of the others,
//! however much they ask for. Nothing is shed here: a call waits until its
//! deadline drops it. Nothing may wait for anything else while it has a turn.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fleet_kms_keyring::ClusterId;
use tokio::sync::oneshot;

/// After so many turns of single calls a waiting batch of the same caller has
/// one, so that single calls alone cannot keep it away for ever.
const SINGLES_IN_A_ROW: u8 = 8;

/// What a turn is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// A wrap: an API server waits to write.
    Wrap,
    /// One unwrap.
    Unwrap,
    /// A part of a batch.
    Batch,
}

/// Hands out turns. Clones are the same.
#[derive(Clone)]
pub struct Turns(Arc<Mutex<Desk>>);

struct Desk {
    free: usize,
    /// Empty while a turn is free.
    waiting: Ring<ClusterId, Ring<Arc<str>, Lane>>,
}

/// A turn, over when dropped.
#[must_use]
pub struct Turn(Option<Turns>);

type Waiter = oneshot::Sender<Turn>;

impl Turns {
    /// Lets `at_a_time` calls work with keys; more than there are processors
    /// only makes each of them slower.
    pub fn new(at_a_time: usize) -> Self {
        Self(Arc::new(Mutex::new(Desk { free: at_a_time.max(1), waiting: Ring::default() })))
    }

    /// Waits for a turn of this caller of this cluster.
    pub async fn turn(&self, cluster: ClusterId, caller: &Arc<str>, work: Work) -> Turn {
        let waiter = {
            let mut desk = self.desk();
            if desk.free > 0 {
                desk.free -= 1;
                return Turn(Some(self.clone()));
            }
            let (sender, waiter) = oneshot::channel();
            desk.waiting.member(cluster).member(Arc::clone(caller)).add(work, sender);
            waiter
        };
        waiter.await.expect("a waiter is kept until it gets its turn")
    }

    /// Gives a turn to the next who still waits.
    fn pass_on(&self) {
        loop {
            let next = {
                let mut desk = self.desk();
                match desk.waiting.take() {
                    Some(next) => next,
                    None => {
                        desk.free += 1;
                        return;
                    }
                }
            };
            match next.send(Turn(Some(self.clone()))) {
                Ok(()) => return,
                // Its caller is gone: the turn is still in hand.
                Err(mut turn) => turn.0 = None,
            }
        }
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(turns) = self.0.take() {
            turns.pass_on();
        }
    }
}

/// Something that calls wait in.
trait Queue: Default {
    /// Takes out whose turn it is.
    fn take(&mut self) -> Option<Waiter>;

    /// Says whether nobody waits.
    fn is_empty(&self) -> bool;
}

/// Members that take turns; one for which nobody waits any more leaves.
struct Ring<K, V> {
    members: HashMap<K, V>,
    order: VecDeque<K>,
}

impl<K, V> Default for Ring<K, V> {
    fn default() -> Self {
        Self { members: HashMap::new(), order: VecDeque::new() }
    }
}

impl<K: Clone + Eq + Hash, V: Queue> Ring<K, V> {
    /// Returns a member; a new one stands at the end.
    fn member(&mut self, key: K) -> &mut V {
        let Self { members, order } = self;
        members.entry(key).or_insert_with_key(|key| {
            order.push_back(key.clone());
            V::default()
        })
    }
}

impl<K: Clone + Eq + Hash, V: Queue> Queue for Ring<K, V> {
    fn take(&mut self) -> Option<Waiter> {
        let key = self.order.pop_front()?;
        let member = self.members.get_mut(&key)?;
        let taken = member.take();
        if member.is_empty() {
            self.members.remove(&key);
        } else {
            self.order.push_back(key);
        }
        taken
    }

    fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
}

/// One caller's calls.
#[derive(Default)]
struct Lane {
    wraps: VecDeque<Waiter>,
    unwraps: VecDeque<Waiter>,
    batches: VecDeque<Waiter>,
    singles: u8,
}

impl Lane {
    fn add(&mut self, work: Work, waiter: Waiter) {
        match work {
            Work::Wrap => self.wraps.push_back(waiter),
            Work::Unwrap => self.unwraps.push_back(waiter),
            Work::Batch => self.batches.push_back(waiter),
        }
    }
}

impl Queue for Lane {
    fn take(&mut self) -> Option<Waiter> {
        if self.singles < SINGLES_IN_A_ROW || self.batches.is_empty() {
            let single = self.wraps.pop_front().or_else(|| self.unwraps.pop_front());
            if single.is_some() {
                self.singles = self.singles.saturating_add(1);
                return single;
            }
        }
        self.singles = 0;
        self.batches.pop_front()
    }

    fn is_empty(&self) -> bool {
        self.wraps.is_empty() && self.unwraps.is_empty() && self.batches.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinHandle;
    use tokio::task::yield_now;

    use super::*;

    type Order = Arc<Mutex<Vec<String>>>;

    struct Rig {
        turns: Turns,
        order: Order,
        tasks: Vec<JoinHandle<()>>,
    }

    impl Rig {
        fn new() -> Self {
            Self { turns: Turns::new(1), order: Order::default(), tasks: Vec::new() }
        }

        /// Lets a call queue up and returns how to cancel it.
        async fn call(&mut self, cluster: u8, caller: &str, work: Work) -> usize {
            let (turns, order, caller) = (self.turns.clone(), Arc::clone(&self.order), Arc::from(caller));
            self.tasks.push(tokio::spawn(async move {
                let _turn = turns.turn(ClusterId::from_bytes([cluster; 16]), &caller, work).await;
                order.lock().unwrap().push(format!("{cluster}{caller} {work:?}"));
            }));
            yield_now().await;
            self.tasks.len() - 1
        }

        async fn order_after(self, held: Turn) -> Vec<String> {
            drop(held);
            for task in self.tasks {
                let _ = task.await;
            }
            assert_eq!(self.turns.desk().free, 1, "every turn came back");
            assert!(self.turns.desk().waiting.members.is_empty(), "nobody is remembered who waits no more");
            Arc::into_inner(self.order).unwrap().into_inner().unwrap()
        }

        async fn held(&self) -> Turn {
            self.turns.turn(ClusterId::from_bytes([0; 16]), &Arc::from("holder"), Work::Wrap).await
        }
    }

    #[tokio::test]
    async fn a_cluster_and_a_caller_with_few_calls_wait_for_one_turn_of_the_others() {
        let mut rig = Rig::new();
        let held = rig.held().await;
        for _ in 0..4 {
            rig.call(1, "a", Work::Batch).await;
        }
        rig.call(1, "b", Work::Batch).await;
        rig.call(2, "c", Work::Unwrap).await;
        let order = rig.order_after(held).await;
        assert_eq!(order, ["1a Batch", "2c Unwrap", "1b Batch", "1a Batch", "1a Batch", "1a Batch"]);
    }

    #[tokio::test]
    async fn wraps_go_before_unwraps_before_batches_which_are_not_kept_away_for_ever() {
        let mut rig = Rig::new();
        let held = rig.held().await;
        rig.call(1, "a", Work::Batch).await;
        rig.call(1, "a", Work::Unwrap).await;
        for _ in 0..9 {
            rig.call(1, "a", Work::Wrap).await;
        }
        let order = rig.order_after(held).await;
        let expected = [vec!["1a Wrap"; 8], vec!["1a Batch", "1a Wrap", "1a Unwrap"]].concat();
        assert_eq!(order, expected);
    }

    #[tokio::test]
    async fn a_call_that_its_deadline_drops_loses_no_turn() {
        let mut rig = Rig::new();
        let held = rig.held().await;
        let dropped = rig.call(1, "a", Work::Unwrap).await;
        rig.call(2, "b", Work::Unwrap).await;
        rig.tasks[dropped].abort();
        yield_now().await;
        assert_eq!(rig.order_after(held).await, ["2b Unwrap"]);

        // Dropped with the turn already on its way.
        let rig = Rig::new();
        let (held, caller) = (rig.held().await, Arc::from("a"));
        let mut waiting = Box::pin(rig.turns.turn(ClusterId::from_bytes([1; 16]), &caller, Work::Wrap));
        assert!(futures_poll(waiting.as_mut()).await.is_none());
        drop(held);
        drop(waiting);
        assert_eq!(rig.turns.desk().free, 1);
    }

    async fn futures_poll<F: Future + Unpin>(mut future: F) -> Option<F::Output> {
        std::future::poll_fn(|context| {
            std::task::Poll::Ready(match std::pin::Pin::new(&mut future).poll(context) {
                std::task::Poll::Ready(value) => Some(value),
                std::task::Poll::Pending => None,
            })
        })
        .await
    }
}
