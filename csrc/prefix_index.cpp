#include "prefix_index.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace pcm {
namespace {

// A step of SplitMix64: every input bit reaches every output bit.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

size_t power_of_two_from(size_t n) {
  size_t power = 1;
  while (power < n) power *= 2;
  return power;
}

}  // namespace

PrefixIndex::PrefixIndex(int32_t num_blocks, int32_t block_size, uint64_t hash_mask)
    : block_size_(block_size),
      hash_mask_(hash_mask),
      nodes_(num_blocks),
      tokens_(static_cast<size_t>(num_blocks) * block_size, 0),
      buckets_(power_of_two_from(2 * static_cast<size_t>(num_blocks)), kNoBlock) {}

uint64_t PrefixIndex::hash_after(uint64_t namespace_id, int32_t parent, const int32_t* block_tokens) const {
  uint64_t hash = parent == kNoBlock ? mix(namespace_id) : nodes_[parent].hash;
  for (int32_t i = 0; i < block_size_; ++i) hash = mix(hash ^ static_cast<uint32_t>(block_tokens[i]));
  return hash & hash_mask_;
}

int32_t PrefixIndex::find(uint64_t namespace_id, int32_t parent, const int32_t* block_tokens, uint64_t hash) const {
  int32_t block = buckets_[bucket(hash)];
  for (; block != kNoBlock; block = nodes_[block].next_in_bucket) {
    const Node& node = nodes_[block];
    if (node.hash == hash && node.namespace_id == namespace_id && node.parent == parent &&
        std::equal(block_tokens, block_tokens + block_size_, tokens(block))) {
      break;
    }
  }
  return block;
}

int32_t PrefixIndex::find_or_add(uint64_t namespace_id, int32_t parent, int32_t block) {
  const uint64_t hash = hash_after(namespace_id, parent, tokens(block));
  const int32_t found = find(namespace_id, parent, tokens(block), hash);
  if (found != kNoBlock) return found;
  Node& node = nodes_[block];
  node = {++last_serial_, hash, namespace_id, buckets_[bucket(hash)], parent, kNoBlock, kNoBlock, kNoBlock};
  buckets_[bucket(hash)] = block;
  if (parent == kNoBlock) return block;
  node.next_sibling = nodes_[parent].first_child;
  if (node.next_sibling != kNoBlock) nodes_[node.next_sibling].prev_sibling = block;
  nodes_[parent].first_child = block;
  return block;
}

int32_t& PrefixIndex::link_to(int32_t block) {
  int32_t* link = &buckets_[bucket(nodes_[block].hash)];
  while (*link != block) link = &nodes_[*link].next_in_bucket;
  return *link;
}

void PrefixIndex::move(int32_t from, int32_t to) {
  std::copy_n(tokens(from), block_size_, tokens(to));
  if (!contains(from)) return;
  link_to(from) = to;
  const Node& node = nodes_[to] = nodes_[from];
  nodes_[from] = Node{};
  if (node.prev_sibling != kNoBlock) {
    nodes_[node.prev_sibling].next_sibling = to;
  } else if (node.parent != kNoBlock) {
    nodes_[node.parent].first_child = to;
  }
  if (node.next_sibling != kNoBlock) nodes_[node.next_sibling].prev_sibling = to;
  for (int32_t child = node.first_child; child != kNoBlock; child = nodes_[child].next_sibling) {
    nodes_[child].parent = to;
  }
}

void PrefixIndex::remove_leaf(int32_t block) {
  Node& node = nodes_[block];
  link_to(block) = node.next_in_bucket;
  if (node.prev_sibling != kNoBlock) {
    nodes_[node.prev_sibling].next_sibling = node.next_sibling;
  } else if (node.parent != kNoBlock) {
    nodes_[node.parent].first_child = node.next_sibling;
  }
  if (node.next_sibling != kNoBlock) nodes_[node.next_sibling].prev_sibling = node.prev_sibling;
  node = Node{};
}

void PrefixIndex::check() const {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw std::logic_error(std::string("prefix_index: ") + what);
  };
  const int32_t num_blocks = static_cast<int32_t>(nodes_.size());
  int32_t num_registered = 0, num_hashed = 0, num_children = 0, num_with_parent = 0;
  for (int32_t block = 0; block < num_blocks; ++block) {
    const Node& node = nodes_[block];
    if (node.serial == 0) {
      require(node.first_child == kNoBlock, "a block that is not registered has children");
      continue;
    }
    ++num_registered;
    num_with_parent += node.parent != kNoBlock;
    require(node.parent == kNoBlock || contains(node.parent), "a registered block lost its prefix");
    require(node.parent == kNoBlock || nodes_[node.parent].namespace_id == node.namespace_id,
            "a prefix crosses namespaces");
    require(node.hash == hash_after(node.namespace_id, node.parent, tokens(block)),
            "the tokens of a registered block changed");
    require(find(node.namespace_id, node.parent, tokens(block)) == block, "a prefix is registered twice");
    for (int32_t child = node.first_child; child != kNoBlock && num_children <= num_blocks; ++num_children) {
      require(nodes_[child].parent == block, "a child has another parent");
      child = nodes_[child].next_sibling;
    }
  }
  for (int32_t block : buckets_) {
    for (; block != kNoBlock && num_hashed <= num_blocks; ++num_hashed) block = nodes_[block].next_in_bucket;
  }
  require(num_registered == num_hashed, "the hash table and the registered blocks differ");
  require(num_children == num_with_parent, "the lists of children and the parents differ");
}

}  // namespace pcm
